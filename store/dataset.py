"""Offers the samples of one split as a PyTorch map-style dataset."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

TokensByLayer = dict[int, Float32[np.ndarray, "rows tokens dim"]]


class StoreDataset:
    """Samples `({layer: (tokens, dim)}, label)` of one split, for `torch.utils.data.DataLoader`.

    Workers of a DataLoader must not be forked: pass `multiprocessing_context="forkserver"` or `"spawn"`.

    Args:
        read: returns the tokens of some rows by layer.
        labels: of all rows.
    """

    def __init__(self, read: Callable[[list[int]], TokensByLayer], labels: Shaped[np.ndarray, "samples ..."]) -> None:
        self._read, self._labels = read, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[dict[int, Float32[np.ndarray, "tokens dim"]], Any]:
        if not 0 <= row < len(self):  # a loop over the dataset ends with an IndexError
            raise IndexError(f"row {row} is outside 0 to {len(self) - 1}")
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[dict[int, Float32[np.ndarray, "tokens dim"]], Any]]:
        tokens = self._read(rows)
        return [
            ({layer: values[i] for layer, values in tokens.items()}, self._labels[row]) for i, row in enumerate(rows)
        ]
