"""Reorders a source to match a store: first the samples that the store holds, in its order, then the new samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from extract.sources.augmented_views import AugmentedSplit
from extract.sources.open_source import ImageSource, ImageSplit, Labels


class OrderedSplit:
    """An ImageSplit with the rows of another one, in another order."""

    def __init__(self, split: ImageSplit, rows: Int64[np.ndarray, "samples"]) -> None:
        self._split, self._rows = split, rows
        self.ids: Sequence[str] = tuple(split.ids[row] for row in rows)
        self.labels: Labels = np.asarray(split.labels)[rows]
        self.validation: Bool[np.ndarray, "samples"] | None = None
        if split.validation is not None:
            self.validation = split.validation[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._split[int(self._rows[row])]

    def digest(self, row: int) -> bytes:
        """16 bytes that identify the sample's content."""
        return self._split.digest(int(self._rows[row]))


def in_store_order(source: ImageSource, stored_ids: Mapping[str, Sequence[str]]) -> ImageSource:
    """The source with every split in the order of a store; ids that the source lacks are skipped.

    Args:
        source: the source.
        stored_ids: by split, the ids of the samples that the store holds, in its order.
    """
    splits = dict[str, ImageSplit]()
    for name, split in source.splits.items():
        if isinstance(split, AugmentedSplit):  # in the order of `train`, which comes before it
            splits[name] = split.of(splits["train"])
        else:
            splits[name] = _reorder(split, stored_ids.get(name, ()))
    return replace(source, splits=splits)


def _reorder(split: ImageSplit, stored_ids: Sequence[str]) -> ImageSplit:
    row_of = {sample_id: row for row, sample_id in enumerate(split.ids)}
    stored = [row_of[sample_id] for sample_id in stored_ids if sample_id in row_of]
    new = sorted(set(range(len(split))).difference(stored))
    rows = np.array(stored + new, np.int64)
    return split if (np.diff(rows) == 1).all() else OrderedSplit(split, rows)
