"""Pooled tokens of whole splits in memory: read-outs are standardized by them, and linear probes read nothing else."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapt.features.feature_source import Features, Rows
from adapt.methods.readout import Readout
from store.console.progress import progress
from store.layout import in_groups

_ROWS_FOR_ROUNDING = 256  # evenly spread rows of a split from which the effect of rounding is estimated


class PooledFeatures:
    """Pooled, normalized tokens of whole splits. Every pooling of every layer is computed once.

    Args:
        features: the tokens.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._poolings: dict[tuple[str, int, str], _PooledSplit] = {}

    def require(self, split: str, readouts: Sequence[Readout]) -> None:
        """Compute all that some read-outs need of a split in one pass over it."""
        missing: dict[tuple[int, str], Readout] = {
            (layer, readout.mode): readout
            for readout in readouts
            for layer in readout.layers
            if (split, layer, readout.mode) not in self._poolings
        }
        if missing:
            self._poolings |= {(split, *key): pooling for key, pooling in self._pool(split, missing).items()}

    def whole(self, split: str, readout: Readout) -> Float[Tensor, "samples features"]:
        """Pooled features of a whole split, in store order, on the CPU, to leave a GPU's memory to the tokens."""
        return _concatenated([pooling.values for pooling in self._of(split, readout)])

    def rounding(self, split: str, readout: Readout) -> Float[Tensor, "features"]:
        """How far the rounding of the tokens moves each pooled feature, for `Readout.standardize`."""
        return _concatenated([pooling.rounding for pooling in self._of(split, readout)])

    def _of(self, split: str, readout: Readout) -> list["_PooledSplit"]:
        self.require(split, [readout])
        return [self._poolings[split, layer, readout.mode] for layer in readout.layers]

    @torch.no_grad()
    def _pool(self, split: str, readouts: Mapping[tuple[int, str], Readout]) -> dict[tuple[int, str], "_PooledSplit"]:
        rows, layers = np.arange(len(self.features.labels(split))), sorted({layer for layer, _ in readouts})
        groups = in_groups(rows, self.features.samples_at_once(layers))
        poolings = {key: _PooledSplit(readout, len(rows)) for key, readout in readouts.items()}
        step = math.ceil(len(rows) / _ROWS_FOR_ROUNDING)
        generators = {layer: torch.Generator().manual_seed(0) for layer in layers}
        with progress(f"pooling {split}", len(rows), "samples") as advance:
            for group, tokens in self.features.batches(split, groups, layers):
                for layer in layers:
                    some = tokens[layer][group % step == 0]
                    error = self.features.rounding(layer, some) * _random_signs(some, generators[layer])
                    for (of_layer, _), pooling in poolings.items():
                        if of_layer == layer:
                            pooling.add(group, tokens[layer], some, error)
                advance(len(group))
        return poolings


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


class _PooledSplit:
    """One pooling of a layer of a split: its features, and how far they move with the rounding of the tokens."""

    def __init__(self, readout: Readout, n_rows: int) -> None:
        width = len(readout.mean) // len(readout.layers)
        self._readout, self._sum_of_squares, self._n_moved = readout, torch.zeros(width), 0
        self.values = torch.empty(n_rows, width)

    def add(self, rows: Rows, tokens: Tensor, some: Tensor, error: Tensor) -> None:
        """Pool the tokens of consecutive rows, and `some` of them with and without an `error`."""
        self.values[rows[0] : rows[-1] + 1] = self._pool(tokens)
        if len(some):
            moved = self._pool(some + error) - self._pool(some)
            self._sum_of_squares += moved.square().sum(dim=0).cpu()
            self._n_moved += len(some)

    def _pool(self, tokens: Tensor) -> Tensor:
        return self._readout.pool(self._readout.normalize(tokens))

    @property
    def rounding(self) -> Float[Tensor, "features"]:
        """The root mean square of the move, over the rows that were moved."""
        return (self._sum_of_squares / self._n_moved).sqrt()


def _random_signs(tokens: Float[Tensor, "rows tokens dim"], generator: torch.Generator) -> Float[Tensor, "rows 1 dim"]:
    """One sign for every row and channel: tokens of a row that hardly differ are all rounded in one direction."""
    return (torch.randint(0, 2, (len(tokens), 1, tokens.shape[2]), generator=generator) * 2.0 - 1).to(tokens.device)
