"""Predictions for the tests of files, intervals and tables."""

import numpy as np

from adapt.run_dir.predictions import Predictions


def make_predictions(right: np.ndarray, trial_id: str = "t0", classes: int = 3, offset: int = 0) -> Predictions:
    """Single-label predictions that are right where `right` is true.

    Args:
        offset: number in the name of the first sample; another one makes other samples.
    """
    labels = np.arange(len(right)) % classes
    predicted = np.where(right, labels, (labels + 1) % classes)
    return Predictions(
        trial_id=trial_id,
        classes=tuple(f"class {k}" for k in range(classes)),
        sample_ids=tuple(f"{offset + number}.png" for number in range(len(right))),
        labels=labels.astype(np.int64),
        logits=np.eye(classes, dtype=np.float32)[predicted],
    )


def make_multi_label(scores: np.ndarray, labels: np.ndarray, trial_id: str = "t0") -> Predictions:
    """Multi-label predictions."""
    return Predictions(
        trial_id=trial_id,
        classes=tuple(f"class {k}" for k in range(scores.shape[1])),
        sample_ids=tuple(f"{number}.png" for number in range(len(scores))),
        labels=labels.astype(np.uint8),
        logits=scores.astype(np.float32),
    )
