"""Predictions for the tests of files, intervals and tables."""

import hashlib
from pathlib import Path

import numpy as np
from result_rows import make_row

from adapt.run_dir.predictions import Predictions, predictions_path, write_predictions
from adapt.run_dir.results import Row, write_results


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


def made_run(run_dir: Path, right: dict[str, list[np.ndarray]], dataset: str = "digits", **changes) -> list[Row]:
    """A run directory with rows and predictions.

    Args:
        right: whether each sample is right, by method, for seeds 0, 1, ...; top-1 and the validation score follow.
    """
    rows = []
    for method, of_seeds in right.items():
        for seed, of_samples in enumerate(of_seeds):
            trial_id = hashlib.sha256(f"{dataset}-{method}-{seed}".encode()).hexdigest()[:16]
            top1 = 100 * float(of_samples.mean())
            rows.append(make_row(method, seed, trial_id=trial_id, top1=top1, dataset=dataset, **changes))
            write_predictions(predictions_path(run_dir, rows[-1]), make_predictions(of_samples, trial_id))
    write_results(run_dir, rows)
    return rows


def first_right(n_right: int, n_samples: int = 1000) -> np.ndarray:
    """Whether each sample is right: the first ones are."""
    return np.arange(n_samples) < n_right
