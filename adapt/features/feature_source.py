"""The interface of all feature sources, which give the same numbers: resident, streamed, and online features."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from adapt.methods.feature_spec import FeatureSpec

Rows = Int[np.ndarray, "_"]


@runtime_checkable
class BatchReader(Protocol):
    """Reads batches of rows."""

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, Any]]:
        """For every group of rows, in order: (rows, {layer: (rows, tokens, dim) float32 on the device}).

        Args:
            split: name of the split.
            groups: rows of each batch.
            layers: which layers to give.
            together: how many groups a source on disk may read at once, in the order of the disk.
        """
        ...


@runtime_checkable
class Features(BatchReader, Protocol):
    """Tokens and labels by row.

    Attributes:
        kind: the name of this source in results.
        spec: layers and shape of the tokens.
        num_classes: number of classes.
        multi_label: whether a sample may have several classes.
        device: of the batches.
    """

    kind: str
    spec: FeatureSpec
    num_classes: int
    multi_label: bool
    device: torch.device

    @property
    def views(self) -> int:
        """Number of consecutive rows that show the same sample."""
        ...

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Class indices (samples,), or multi-label 0/1 (samples, classes)."""
        ...

    def validation_rows(self) -> Rows | None:
        """Rows of `train` that are the source's own validation split, ascending; None if validation is drawn."""
        ...

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """Number of samples that fit into one forward and backward pass."""
        ...

    def part_size(self, layers: Sequence[int]) -> int:
        """Number of samples of a batch that are trained on at once, whatever other candidates of the pass read."""
        ...

    def for_epoch(self, seed: int, epoch: int) -> BatchReader:
        """What gives the batches of `train` in one epoch of training."""
        ...

    def rounding(self, layer: int, tokens: Float[Tensor, "rows tokens dim"]) -> Float[Tensor, "rows tokens dim"]:
        """For every value of such a batch, the most by which another forward pass of the backbone may differ."""
        ...
