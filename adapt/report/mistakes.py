"""Finds the most confident mistakes of a method on the test split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, softmax

from adapt.report.comparison import Comparison
from adapt.report.reported_rows import ReportedRows
from adapt.report.sample_pictures import config_of, pictures
from adapt.run_dir.predictions import Predictions
from store.errors import JobError, UserError

_MOST = 12


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A sample that was taken for a wrong class.

    Args:
        number: of the sample, among those of the trial.
        true: its class, or its classes.
        true_percent: probability of its class; of several, of the likeliest; 0 of none.
        predicted: the wrong class.
        percent: probability of the wrong class.
    """

    number: int
    true: str
    true_percent: float
    predicted: str
    percent: float


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """The most confident mistakes of one trial.

    Args:
        label: the method and its seed.
        shown: each mistake with its picture as a `data:` URL.
        note: why there are no pictures; empty if there are.
    """

    label: str
    shown: Sequence[tuple[Mistake, str]]
    note: str = ""


def mistakes_of(comparison: Comparison, reported: ReportedRows) -> Mistakes | None:
    """The mistakes of the best method on validation, of its first seed with predictions.

    Returns:
        None if there are no predictions or no mistakes, or if `report.pictures` is false.

    Raises:
        UserError: predictions are damaged.
    """
    best = comparison.best
    found = (
        next(((row, trial) for row in best.rows if (trial := reported.read_predictions(row))), None) if best else None
    )
    if best is None or found is None:
        return None
    row, trial = found
    label, run_dir, mistakes = f"{best.label}, seed {row.seed}", reported.run_dirs[row.trial_id], most_confident(trial)
    try:
        config = config_of(run_dir)
        if not mistakes or not config.report.pictures:
            return None
        images = pictures(config, trial, [mistake.number for mistake in mistakes])
    except (UserError, JobError, OSError) as error:
        reason = " ".join(str(error).split())
        return Mistakes(label=label, shown=(), note=f"Pictures are left out: {reason}")
    return Mistakes(label=label, shown=list(zip(mistakes, images, strict=True)))


def most_confident(trial: Predictions) -> list[Mistake]:
    """The mistakes with the highest probabilities, at most twelve.

    With several labels a sample, a mistake is a class that it lacks and that has a probability above one half.
    """
    found = _of_single_label(trial) if trial.labels.ndim == 1 else _of_multi_label(trial)
    return sorted(found, key=lambda mistake: (-mistake.percent, mistake.number))[:_MOST]


def _of_single_label(trial: Predictions) -> list[Mistake]:
    predicted = trial.logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != trial.labels)
    probabilities = 100 * softmax(trial.logits[wrong].astype(np.float64), axis=1)
    return [
        Mistake(
            number=number,
            true=trial.classes[trial.labels[number]],
            true_percent=float(of_sample[trial.labels[number]]),
            predicted=trial.classes[predicted[number]],
            percent=float(of_sample[predicted[number]]),
        )
        for number, of_sample in zip(wrong.tolist(), probabilities, strict=True)
    ]


def _of_multi_label(trial: Predictions) -> list[Mistake]:
    is_true = trial.labels.astype(bool)
    wrong = np.where(is_true, -np.inf, trial.logits).astype(np.float64)
    found = []
    for number in np.flatnonzero(wrong.max(axis=1) > 0).tolist():
        own, predicted = np.flatnonzero(is_true[number]), int(wrong[number].argmax())
        found.append(
            Mistake(
                number=number,
                true=", ".join(trial.classes[k] for k in own) or "none",
                true_percent=100 * float(expit(trial.logits[number, own].max())) if len(own) else 0.0,
                predicted=trial.classes[predicted],
                percent=100 * float(expit(wrong[number, predicted])),
            )
        )
    return found
