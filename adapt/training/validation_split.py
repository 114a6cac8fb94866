"""Draws validation rows from the training split by seed; they are a list of row numbers, never a stored split."""

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from adapt.training.batch_order import Rows
from store.errors import UserError


def draw_validation(
    labels: Shaped[Tensor, "rows ..."], fraction: float, seed: int, views: int = 1
) -> tuple[Rows, Rows]:
    """Split the rows of the training split into rows to train on and rows to validate on.

    A single-label split is stratified: every class gives the same fraction. The `views` consecutive rows of a sample
    stay together, so that validation never sees a video that is trained on.

    Args:
        labels: labels of all rows.
        fraction: fraction of the samples that are for validation.
        seed: seed of the draw.
        views: consecutive rows that show the same sample.

    Returns:
        (training rows, validation rows), both ascending.

    Raises:
        UserError: there are too few samples for both parts.
    """
    values = labels.numpy()[::views]
    groups = [np.arange(len(values))] if values.ndim == 2 else [np.flatnonzero(values == k) for k in np.unique(values)]
    draw = np.random.default_rng(seed)
    chosen = np.concatenate([draw.permutation(group)[: round(fraction * len(group))] for group in groups])
    validation = np.sort(chosen)
    training = np.setdiff1d(np.arange(len(values)), validation)
    if not len(validation) or not len(training):
        raise UserError(
            f"val_fraction {fraction} of {len(values)} training samples leaves {len(training)} to train on and "
            f"{len(validation)} to validate on; both must be at least 1"
        )
    return _rows_of(training, views), _rows_of(validation, views)


def _rows_of(samples: Rows, views: int) -> Rows:
    """The rows of all views of some samples."""
    rows: Rows = (samples[:, None] * views + np.arange(views)).ravel()
    return rows
