"""Draws the rows that a seed trains and validates on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapt.training.objective import make_objective
from adapt.training.seed_rows import SeedRows
from adapt.training.settings import Settings
from adapt.training.validation_split import draw_validation


@dataclass(frozen=True, kw_only=True)
class RowDraw:
    """How the rows of a seed are drawn.

    Args:
        val_fraction: share of the training split that is for validation.
        refit: whether the rows for validation are trained on too; the last epoch then counts.
    """

    val_fraction: float
    refit: bool = False

    def draw(self, features: Any, settings: Settings, seed: int) -> SeedRows:
        """The rows of one seed, and its loss."""
        labels = features.labels("train")
        rows, val_rows = draw_validation(labels, self.val_fraction, seed, features.views)
        if self.refit:
            rows, val_rows = np.union1d(rows, val_rows), val_rows[:0]
        objective = make_objective(
            labels[torch.from_numpy(rows)],
            features.num_classes,
            multi_label=features.multi_label,
            balance_classes=settings.balance_classes,
            views=features.views,
        )
        return SeedRows(seed=seed, rows=rows, val_rows=val_rows, objective=objective)
