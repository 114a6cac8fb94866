"""Checks the row indices that a caller asks a store for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from store.errors import UserError

RowIndices = Sequence[int] | Integer[np.ndarray, "rows"] | slice


def check_indices(
    rows: Sequence[int] | Integer[np.ndarray, "rows"], total: int, split: str
) -> Integer[np.ndarray, "rows"]:
    """The indices as an array.

    Raises:
        UserError: one is outside the split; or they are anything but integers, since a mask of booleans would otherwise
            select rows 0 and 1.
    """
    indices = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
    if indices.dtype.kind not in "iu" or indices.ndim != 1 or not ((indices >= 0) & (indices < total)).all():
        raise UserError(f"rows must be a list of indices from 0 to {total - 1} in {split!r}, got {rows!r}")
    return indices
