"""The interface of what the training loop reads: features or images by row."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64, Shaped
from torch import Tensor

from adapt.features.feature_source import BatchReader
from adapt.methods.feature_spec import TokenBatch


@runtime_checkable
class Batches(BatchReader, Protocol):
    """What the loop needs of features, or of images."""

    device: torch.device

    @property
    def views(self) -> int:
        """Consecutive rows that show the same sample."""
        ...

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Labels by row."""
        ...

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """How many samples fit into memory in one forward and backward pass."""
        ...

    def part_size(self, layers: Sequence[int]) -> int:
        """How many samples of a batch are trained on at once, whatever other candidates read."""
        ...

    def for_epoch(self, seed: int, epoch: int) -> BatchReader:
        """What gives the batches of `train` in one epoch: images may be augmented, views of samples drawn."""
        ...


def as_model_input(values: Any) -> Any:
    """What a source gives for a group of rows, as models take it: tokens remember what several models compute."""
    return values if isinstance(values, Tensor) else TokenBatch.of(values)


def select(values: Any, index: Int[np.ndarray, "_"], n_rows: int) -> Any:
    """Some of the rows of tokens, or of images; all of them without a copy."""
    if len(index) == n_rows:
        return values
    if isinstance(values, Tensor):
        return values[torch.from_numpy(index).to(values.device)]
    device = next(iter(values.values())).device
    return values.select(torch.from_numpy(index).to(device))


def mix(values: Any, order: Int64[Tensor, "rows"], share: float) -> Any:
    """A share of every image, or of all tokens of every sample, plus the rest of another one's, in this order."""
    if isinstance(values, Tensor):
        return share * values + (1 - share) * values[order]
    return TokenBatch({layer: mix(values[layer], order, share) for layer in values.layers})


def scale_channels(values: TokenBatch, deviation: float, random_seed: int) -> TokenBatch:
    """Multiply every channel of every sample, in all tokens of a layer, by 1 plus Gaussian noise of its own."""
    found = {}
    for layer in values.layers:  # each has its own numbers, whichever others are read
        tokens, generator = values[layer], torch.Generator(values[layer].device).manual_seed(random_seed + layer)
        noise = torch.randn(len(tokens), 1, tokens.shape[-1], generator=generator, device=tokens.device)
        found[layer] = tokens * (1 + deviation * noise)
    return TokenBatch(found)
