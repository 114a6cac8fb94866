"""Samples -> pixels -> frozen forward -> the tokens that a store keeps, or that online training uses directly."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from extract.backbones.backbone import Backbone, Images, TokensByLayer, reduce_tokens
from extract.backbones.preprocessing import Transform
from extract.config import ExtractConfig
from extract.forward.batch_size import choose_batch_size
from extract.forward.device import autocast, resolve_device, resolve_precision, to_device
from extract.forward.threads import thread_pool
from extract.images.decode import DecodeError, undecodable
from extract.images.resize_limit import ResizeError
from extract.sources.open_source import ImageSplit
from store.config import Tokens

RowTransform = Callable[[Any, int], Float[Tensor, "..."]]
_AHEAD = 2  # batches decoded while one is in the forward pass


@dataclass(frozen=True)
class Batch:
    """Rows of a split with their pixels; rows that could not be decoded are apart, with the reason."""

    rows: tuple[int, ...]
    images: Images | None
    failed: dict[int, str]


class FrozenForward:
    """The backbone on its device, from batches of samples to reduced tokens of the chosen layers."""

    def __init__(self, backbone: Backbone, layers: Sequence[int], tokens: Tokens, config: ExtractConfig) -> None:
        self.backbone, self.layers, self._tokens = backbone, tuple(layers), tokens
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self._wanted = config.batch_size
        self._found: dict[int, int] = {}  # batch sizes by numbers of samples
        backbone.module.to(self.device)

    def batch_size(self, samples: int) -> int:
        """`extract.batch_size`, where that is a number; else what fills the device, or holds so many samples."""
        if isinstance(self._wanted, int):
            return self._wanted
        if samples not in self._found:
            size = self.backbone.image_size
            frames = size[0] if len(size) == 4 else 1

            def run(n: int) -> TokensByLayer:
                return self(torch.zeros(n, *size, device=self.device))

            self._found[samples] = choose_batch_size(self.device, run, samples, frames)
        return self._found[samples]

    @torch.no_grad()
    def __call__(self, images: Images, layers: Sequence[int] | None = None) -> TokensByLayer:
        """Reduced tokens of the chosen layers (or of fewer), float32, on the device."""
        with autocast(self.device, self.precision):
            tokens = self.backbone.tokens(to_device(images, self.device), layers or self.layers)
        layout = self.backbone.layout
        return {layer: reduce_tokens(values.float(), layout, self._tokens) for layer, values in tokens.items()}

    def batches(self, split: ImageSplit, groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Decode and preprocess groups of rows in order, a few groups ahead."""
        transform = self.backbone.transform
        return decode_batches(split, groups, lambda picture, row: preprocess(transform, picture, split.ids[row]))


def preprocess(transform: Transform, sample: Any, sample_id: str) -> Tensor:
    """An image, the stacked frames of a clip, or a sample of a user's own dataset, as the backbone takes it.

    Raises:
        DecodeError: an image is so thin that resizing it would take too much memory.
    """
    try:
        if isinstance(sample, tuple) and all(isinstance(frame, Image.Image) for frame in sample):
            return torch.stack([torch.as_tensor(transform(frame)) for frame in sample])
        return torch.as_tensor(transform(sample))
    except ResizeError as error:
        raise undecodable(sample_id, error) from error


def decode_batches(split: ImageSplit, groups: Sequence[Sequence[int]], transform: RowTransform) -> Iterator[Batch]:
    """Decode groups of rows in order, a few groups ahead, on all cores; `transform` gets an image and its row."""
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


def _collect(rows: Sequence[int], loaded: list[Tensor | str]) -> Batch:
    good = [(row, image) for row, image in zip(rows, loaded, strict=True) if isinstance(image, Tensor)]
    failed = {row: reason for row, reason in zip(rows, loaded, strict=True) if isinstance(reason, str)}
    images = torch.stack([image for _, image in good]) if good else None
    return Batch(tuple(row for row, _ in good), images, failed)
