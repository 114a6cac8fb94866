"""Pooled tokens of whole splits, in memory, for those who read them more than once."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapt.features import Features
from adapt.readout import Readout
from store.groups import in_groups
from store.progress import progress


class PooledFeatures:
    """Pooled, normalised tokens of whole splits: what read-outs are standardised by, and all that linear probes read.

    Every pooling of every layer is computed once, whatever asks for it again.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._kept: dict[tuple[str, int, str], Tensor] = {}

    def require(self, split: str, layer: int, readouts: Sequence[Readout]) -> None:
        """Compute what these read-outs need of a split, in one pass over it."""
        missing: dict[str, Readout] = {
            readout.mode: readout for readout in readouts if (split, layer, readout.mode) not in self._kept
        }
        if missing:
            self._kept |= {(split, layer, mode): values for mode, values in self._pool(split, layer, missing).items()}

    def whole(self, split: str, layer: int, readout: Readout) -> Float[Tensor, "samples features"]:
        """Pooled features of a whole split, in store order, on the CPU: a GPU has tokens to hold."""
        self.require(split, layer, [readout])
        return self._kept[split, layer, readout.mode]

    @torch.no_grad()
    def _pool(self, split: str, layer: int, readouts: Mapping[str, Readout]) -> dict[str, Tensor]:
        rows = np.arange(len(self.features.labels(split)))
        groups = in_groups(rows, self.features.samples_at_once([layer]))
        pooled: dict[str, Tensor] = {}
        with progress(f"pooling {split}", len(rows), "samples") as advance:
            for group, tokens in self.features.batches(split, groups, [layer]):
                for mode, readout in readouts.items():
                    part = readout.pool(readout.normalise(tokens[layer]))
                    if mode not in pooled:
                        pooled[mode] = torch.empty(len(rows), part.shape[1])
                    pooled[mode][group[0] : group[-1] + 1] = part
                advance(len(group))
        return pooled
