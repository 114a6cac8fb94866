"""Pooled tokens of whole splits, in memory, for those who read them more than once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapt.features.feature_sources import Features
from adapt.methods.readout import Readout
from store.console.progress import progress
from store.layout import in_groups

Rows = Int[np.ndarray, "_"]
_MOVED_ROWS = 256  # of a split, evenly spread, that tell how far rounding moves a feature


class PooledFeatures:
    """Pooled, normalized tokens of whole splits: what read-outs are standardized by, and all that linear probes read.

    Every pooling of every layer is computed once, whatever asks for it again.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._kept: dict[tuple[str, int, str], _Pooling] = {}

    def require(self, split: str, layer: int, readouts: Sequence[Readout]) -> None:
        """Compute what these read-outs need of a split, in one pass over it."""
        missing: dict[str, Readout] = {
            readout.mode: readout for readout in readouts if (split, layer, readout.mode) not in self._kept
        }
        if missing:
            poolings = self._pool(split, layer, list(missing.values()))
            self._kept |= {(split, layer, mode): pooling for mode, pooling in zip(missing, poolings, strict=True)}

    def whole(self, split: str, layer: int, readout: Readout) -> Float[Tensor, "samples features"]:
        """Pooled features of a whole split, in store order, on the CPU: a GPU has tokens to hold."""
        self.require(split, layer, [readout])
        return self._kept[split, layer, readout.mode].values

    def rounding(self, split: str, layer: int, readout: Readout) -> Float[Tensor, "features"]:
        """How far the rounding of the tokens moves each pooled feature, as `Readout.standardize` wants it."""
        self.require(split, layer, [readout])
        return self._kept[split, layer, readout.mode].rounding

    @torch.no_grad()
    def _pool(self, split: str, layer: int, readouts: Sequence[Readout]) -> list["_Pooling"]:
        rows = np.arange(len(self.features.labels(split)))
        groups = in_groups(rows, self.features.samples_at_once([layer]))
        poolings = [_Pooling(readout, len(rows)) for readout in readouts]
        every, signs = math.ceil(len(rows) / _MOVED_ROWS), torch.Generator().manual_seed(0)
        with progress(f"pooling {split}", len(rows), "samples") as advance:
            for group, tokens in self.features.batches(split, groups, [layer]):
                some = tokens[layer][group % every == 0]
                error = self.features.rounding(layer, some) * _random_signs(some, signs)
                for pooling in poolings:
                    pooling.add(group, tokens[layer], some, error)
                advance(len(group))
        return poolings


class _Pooling:
    """One pooling of a split: its features, and how far they move with the rounding of the tokens."""

    def __init__(self, readout: Readout, n_rows: int) -> None:
        self._readout, self._squares, self._moved = readout, torch.zeros(len(readout.mean)), 0
        self.values = torch.empty(n_rows, len(readout.mean))

    def add(self, rows: Rows, tokens: Tensor, some: Tensor, error: Tensor) -> None:
        """Pool the tokens of some rows that follow one another; `some` of them are moved by `error`."""
        self.values[rows[0] : rows[-1] + 1] = self._pool(tokens)
        if len(some):
            moved = self._pool(some + error) - self._pool(some)
            self._squares += moved.square().sum(dim=0).cpu()
            self._moved += len(some)

    def _pool(self, tokens: Tensor) -> Tensor:
        return self._readout.pool(self._readout.normalize(tokens))

    @property
    def rounding(self) -> Float[Tensor, "features"]:
        """The root of the mean square over the rows that were moved."""
        return (self._squares / self._moved).sqrt()


def _random_signs(tokens: Float[Tensor, "rows tokens dim"], draw: torch.Generator) -> Float[Tensor, "rows 1 dim"]:
    """One for every row and channel: the errors of a row's tokens do not cancel out where these hardly differ."""
    return (torch.randint(0, 2, (len(tokens), 1, tokens.shape[2]), generator=draw) * 2.0 - 1).to(tokens.device)
