"""Holds the rows that one seed trains and validates on, and its loss."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from adapt.training.batch_order import Rows
from adapt.training.objective import Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedRows:
    """The rows of one seed, shared by all its candidates.

    Args:
        seed: decides these rows, the initial weights, dropout and mixup.
        rows: rows of the training split that are trained on, ascending.
        val_rows: rows of the training split that the best epoch is chosen by, ascending; none where the last epoch is
            kept.
        objective: the loss.
    """

    seed: int
    rows: Rows
    val_rows: Rows
    objective: Objective


def mask_of(rows: Rows, n_rows: int) -> Bool[np.ndarray, "rows"]:
    """For every row of a split, whether it is one of these."""
    mask = np.zeros(n_rows, bool)
    mask[rows] = True
    return mask
