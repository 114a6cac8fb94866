"""The order of a store: the samples that it holds first, in its rows' order, and then the new ones in the source's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from extract.sources.open_source import ImageSource, ImageSplit, Labels


class OrderedSplit:
    """An ImageSplit whose rows are those of another one, in another order."""

    def __init__(self, split: ImageSplit, rows: Int64[np.ndarray, "samples"]) -> None:
        self._split, self._rows = split, rows
        self.ids: Sequence[str] = tuple(split.ids[row] for row in rows)
        self.labels: Labels = np.asarray(split.labels)[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._split[int(self._rows[row])]

    def digest(self, row: int) -> bytes:
        """16 bytes that stand for the sample's content."""
        return self._split.digest(int(self._rows[row]))


def in_store_order(source: ImageSource, ids: Mapping[str, Sequence[str]]) -> ImageSource:
    """The source with its splits in the order of a store that holds `ids`, as far as the source has them."""
    splits = {name: _in_order(split, ids.get(name, ())) for name, split in source.splits.items()}
    return replace(source, splits=splits)


def _in_order(split: ImageSplit, ids: Sequence[str]) -> ImageSplit:
    row_of = {sample: row for row, sample in enumerate(split.ids)}
    held = [row_of[sample] for sample in ids if sample in row_of]
    new = sorted(set(range(len(split))).difference(held))
    rows = np.array(held + new, np.int64)
    return split if (np.diff(rows) == 1).all() else OrderedSplit(split, rows)
