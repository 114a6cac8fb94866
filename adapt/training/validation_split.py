"""Validation rows: an index list drawn from the training split by seed, never a stored group."""

import numpy as np
from jaxtyping import Int, Shaped
from torch import Tensor

from store.errors import UserError

Rows = Int[np.ndarray, "_"]


def draw_validation(
    labels: Shaped[Tensor, "rows ..."], fraction: float, seed: int, views: int = 1
) -> tuple[Rows, Rows]:
    """Split rows into (training, validation), both ascending; single-label splits keep every class's share.

    The `views` consecutive rows of a sample stay together: validation never sees a video that is trained on.

    Raises:
        UserError: there are too few samples for both parts.
    """
    values = labels.numpy()[::views]
    groups = [np.arange(len(values))] if values.ndim == 2 else [np.flatnonzero(values == k) for k in np.unique(values)]
    drawn = np.random.default_rng(seed)
    chosen = np.concatenate([drawn.permutation(group)[: round(fraction * len(group))] for group in groups])
    validation = np.sort(chosen)
    training = np.setdiff1d(np.arange(len(values)), validation)
    if not len(validation) or not len(training):
        raise UserError(
            f"val_fraction {fraction} of {len(values)} training samples leaves {len(training)} to train on and "
            f"{len(validation)} to validate on; both must be at least 1"
        )
    return _rows_of(training, views), _rows_of(validation, views)


def _rows_of(samples: Rows, views: int) -> Rows:
    rows: Rows = (samples[:, None] * views + np.arange(views)).ravel()
    return rows
