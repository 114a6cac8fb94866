"""Draws the rows of a seed from the labels of the features."""

import numpy as np
import torch

from adapt.features.feature_source import Features
from adapt.training.objective import make_objective
from adapt.training.row_draw import RowDraw, draw_rows
from adapt.training.seed_rows import SeedRows


def rows_of_seed(features: Features, row_draw: RowDraw, seed: int, balance_classes: bool) -> SeedRows:
    """Draw the rows of a seed, and make its loss for the labels that are trained on.

    Args:
        features: labels, and the source's own validation rows if it has any.
        row_draw: how rows are drawn.
        seed: the seed.
        balance_classes: whether every class has the same weight in the loss.

    Raises:
        UserError: as of `draw_rows`.
    """
    labels, own = features.labels("train"), features.validation_rows()
    rows, val_rows = draw_rows(labels, row_draw, seed=seed, views=features.views, validation_rows=own)
    if row_draw.refit:
        rows, val_rows = np.union1d(rows, val_rows), val_rows[:0]
    objective = make_objective(
        labels[torch.from_numpy(rows)],
        features.num_classes,
        multi_label=features.multi_label,
        balance_classes=balance_classes,
        views=features.views,
    )
    return SeedRows(seed=seed, rows=rows, val_rows=val_rows, objective=objective)
