"""Preprocessed images by row, for methods that train inside the backbone, and the backbone that they copy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adapt.features.feature_source import Rows
from extract.backbones.backbone import ModelBackbone
from extract.forward.device import bytes_at_once, to_device
from extract.forward.frozen_forward import decode_batches, draw_view, preprocess
from extract.sources.open_source import ImageSource
from store.errors import UserError

# Bytes of activations that a forward and backward pass holds at once.
_BYTES_ON_CPU, _SHARE_OF_GPU = 2**29, 1 / 4
_VALUES_KEPT = 18  # by a block for every token and channel: inputs, norms, q, k, v, and the four times wider MLP, twice


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """Images by row, in the order of the features of the same samples.

    Args:
        source: the samples.
        backbone: the frozen model, whose preprocessing the images get.
        device: of the batches.
        rows: split -> the source's row of every row here; samples that the store skipped are left out.
        augment: whether training augments the images.
        view: (seed, epoch) of the augmentation; None for plain evaluation.
    """

    source: ImageSource
    backbone: ModelBackbone
    device: torch.device
    rows: Mapping[str, Rows]
    augment: bool = False
    view: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """The name of these inputs in results."""
        return image_kind(self.augment)

    @property
    def views(self) -> int:
        """See `adapt.features.feature_source.Features.views`."""
        return self.source.views

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `adapt.features.feature_source.Features.labels`."""
        return torch.from_numpy(np.asarray(self.source.splits[split].labels)[self.rows[split]])

    def validation_rows(self) -> Rows | None:
        """See `adapt.features.feature_source.Features.validation_rows`."""
        marks = self.source.splits["train"].validation
        return None if marks is None else np.flatnonzero(marks[self.rows["train"]])

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """See `adapt.features.feature_source.Features.samples_at_once`."""
        n_bytes = 4 * _VALUES_KEPT * (max(layers) + 1) * self.backbone.layout.num_tokens * self.backbone.dim
        return max(1, bytes_at_once(self.device, _BYTES_ON_CPU, _SHARE_OF_GPU) // n_bytes)

    def part_size(self, layers: Sequence[int]) -> int:
        """Number of images of a batch that are trained on at once."""
        return self.samples_at_once(layers)

    def for_epoch(self, seed: int, epoch: int) -> "ImageBatches":
        """The images as one epoch of training reads them."""
        return replace(self, view=(seed, epoch)) if self.augment else self

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, Float[Tensor, "rows ... channels height width"]]]:
        """For every group of rows, in order: (rows, images or clips on the device)."""
        source = self.source.splits[split]
        source_rows = [self.rows[split][group].tolist() for group in groups]
        batches = decode_batches(
            source, source_rows, lambda picture, row: self._transform(picture, row, source.ids[row])
        )
        for rows, batch in zip(groups, batches, strict=True):
            if batch.failed:
                raise UserError(f"{next(iter(batch.failed.values()))} (end-to-end training cannot skip samples)")
            assert batch.images is not None
            yield rows, to_device(batch.images, self.device)

    def _transform(self, picture: Any, row: int, sample_id: str) -> Float[Tensor, "..."]:
        """Preprocess one image, or all frames of a clip alike."""
        if self.view is None:
            return preprocess(self.backbone.transform, picture, sample_id)
        return draw_view(self.backbone, picture, sample_id, seed=[*self.view, row])


def image_kind(augment: bool) -> str:
    """The name of images as inputs in results."""
    return "augmented images" if augment else "images"
