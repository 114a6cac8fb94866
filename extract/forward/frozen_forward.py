"""Runs samples through the frozen backbone: decode, preprocess, forward pass, reduce the tokens.

The extraction stores these tokens; online training uses them directly.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from extract.backbones.backbone import Backbone, Images, ModelBackbone, TokensByLayer, reduce_tokens
from extract.backbones.preprocessing import Transform
from extract.config import ExtractConfig
from extract.forward.batch_size import choose_batch_size
from extract.forward.device import autocast, resolve_device, resolve_precision, to_device
from extract.forward.threads import thread_pool
from extract.images.decode import DecodeError, undecodable
from extract.images.resize_limit import ResizeError
from extract.sources.augmented_views import AugmentedImage
from extract.sources.open_source import ImageSplit
from store.config import Tokens

RowTransform = Callable[[Any, int], Float[Tensor, "..."]]
_AHEAD = 2  # batches that are decoded during a forward pass


@dataclass(frozen=True)
class DecodedBatch:
    """Rows of a split with their pixels, and the rows that could not be decoded with the reason.

    Attributes:
        rows: those that were decoded.
        images: their pixels in the order of `rows`; None if there are none.
        failed: row -> reason.
    """

    rows: tuple[int, ...]
    images: Images | None
    failed: dict[int, str]


class FrozenForward:
    """The frozen backbone on its device: maps batches of samples to the reduced tokens of some layers.

    Args:
        backbone: its module is moved to the device.
        layers: absolute indices.
        tokens: the reduction, as of `store.tokens`.
        config: device, precision and batch size.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int], tokens: Tokens, config: ExtractConfig) -> None:
        self.backbone, self.layers, self._tokens = backbone, tuple(layers), tokens
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self._configured_batch = config.batch_size
        self._chosen: dict[int, int] = {}  # batch size by number of samples
        backbone.module.to(self.device)

    def batch_size(self, samples: int) -> int:
        """`extract.batch_size`; for `auto` what fits the device, and is not larger than needed for so many samples."""
        if isinstance(self._configured_batch, int):
            return self._configured_batch
        if samples not in self._chosen:
            size = self.backbone.image_size
            frames = size[0] if len(size) == 4 else 1

            def run(n: int) -> TokensByLayer:
                return self(torch.zeros(n, *size, device=self.device))

            self._chosen[samples] = choose_batch_size(self.device, run, samples, frames)
        return self._chosen[samples]

    @torch.no_grad()
    def __call__(self, images: Images, layers: Sequence[int] | None = None) -> TokensByLayer:
        """Reduced tokens of the layers (or of a subset), float32, on the device."""
        with autocast(self.device, self.precision):
            tokens = self.backbone.tokens(to_device(images, self.device), layers or self.layers)
        layout = self.backbone.layout
        return {layer: reduce_tokens(values.float(), layout, self._tokens) for layer, values in tokens.items()}

    def batches(self, split: ImageSplit, groups: Sequence[Sequence[int]]) -> Iterator[DecodedBatch]:
        """Decode and preprocess groups of rows, in order and a few groups ahead."""
        return decode_batches(split, groups, lambda sample, row: self._preprocess(sample, split.ids[row]))

    def _preprocess(self, sample: Any, sample_id: str) -> Float[Tensor, "..."]:
        """Preprocess a sample, or augment an image of which an augmented view is wanted."""
        if isinstance(sample, AugmentedImage):
            assert isinstance(self.backbone, ModelBackbone)
            return draw_view(self.backbone, sample.image, sample_id, seed=sample.seed)
        return preprocess(self.backbone.transform, sample, sample_id)


def preprocess(transform: Transform, sample: Any, sample_id: str) -> Tensor:
    """Apply the backbone's transform to an image, to every frame of a clip, or to a sample of a user's dataset.

    Raises:
        DecodeError: an image is so thin that resizing it would take too much memory.
    """
    try:
        if isinstance(sample, tuple) and all(isinstance(frame, Image.Image) for frame in sample):
            return torch.stack([torch.as_tensor(transform(frame)) for frame in sample])
        return torch.as_tensor(transform(sample))
    except ResizeError as error:
        raise undecodable(sample_id, error) from error


def draw_view(backbone: ModelBackbone, sample: Any, sample_id: str, seed: int | Sequence[int]) -> Tensor:
    """Draw a random crop and flip of an image, the same for every frame of a clip; equal seeds draw the same.

    Raises:
        DecodeError: an image is so thin that resizing it would take too much memory.
    """
    return preprocess(lambda image: backbone.augment(image, np.random.default_rng(seed)), sample, sample_id)


def decode_batches(
    split: ImageSplit, groups: Sequence[Sequence[int]], transform: RowTransform
) -> Iterator[DecodedBatch]:
    """Decode groups of rows on all cores, in order and a few groups ahead.

    Args:
        transform: maps a decoded sample and its row to a tensor.
    """
    pending: deque[list[Future[Tensor | str]]] = deque()
    with thread_pool(os.cpu_count(), "decode") as pool:
        for position, group in enumerate(groups):
            for ahead in groups[position + len(pending) : position + 1 + _AHEAD]:
                pending.append([pool.submit(_load, split, row, transform) for row in ahead])
            yield _collect(group, [future.result() for future in pending.popleft()])


def _load(split: ImageSplit, row: int, transform: RowTransform) -> Float[Tensor, "..."] | str:
    try:
        return transform(split[row], row)
    except DecodeError as error:
        return str(error)


def _collect(rows: Sequence[int], loaded: list[Tensor | str]) -> DecodedBatch:
    decoded = [(row, image) for row, image in zip(rows, loaded, strict=True) if isinstance(image, Tensor)]
    failed = {row: reason for row, reason in zip(rows, loaded, strict=True) if isinstance(reason, str)}
    images = torch.stack([image for _, image in decoded]) if decoded else None
    return DecodedBatch(tuple(row for row, _ in decoded), images, failed)
