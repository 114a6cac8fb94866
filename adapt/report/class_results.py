"""Computes the results of a method by class from its predictions: accuracies, confusions, calibration.

Everything is averaged over the seeds of the method that were tested on the same samples as its first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from adapt.report.evidence import ReadPredictions
from adapt.report.seed_averages import Summary
from adapt.run_dir.predictions import Predictions
from adapt.training.calibration import ConfidenceBin, calibration_error, confidence_bins

MOST_IN_MATRIX = 30  # classes
_MOST_LISTED = 40  # classes
_MOST_PAIRS = 20


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """How well one class is told.

    Args:
        name: of the class.
        samples: of the class in the test split.
        percent: accuracy, or average precision for multi-label data.
        taken_for: the class that its samples are most often taken for, with their share; empty if for none.
    """

    name: str
    samples: int
    percent: float
    taken_for: str = ""


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """A class whose samples are taken for another one; `percent` is their share, `samples` their mean number."""

    true: str
    predicted: str
    percent: float
    samples: float


@dataclass(frozen=True, kw_only=True)
class ClassResults:
    """The results of a method by class.

    Args:
        metric: what `ClassResult.percent` is.
        n_classes: of the data set.
        listed: the classes with a sample, from the worst on; of many only the first.
        names: of the rows and columns of the matrix; empty for many classes and for multi-label data.
        matrix: how many percent of the samples of each class are taken for which.
        pairs: the most confused pairs, if there is no matrix.
        bins: of the confidence of all seeds together; none for multi-label data.
        calibration_error: expected calibration error in percent, mean over seeds; None for multi-label data.
    """

    metric: str
    n_classes: int
    listed: Sequence[ClassResult]
    names: Sequence[str] = ()
    matrix: Sequence[Sequence[float]] = ()
    pairs: Sequence[ConfusedPair] = ()
    bins: Sequence[ConfidenceBin] = ()
    calibration_error: float | None = None


def class_results(summary: Summary, read: ReadPredictions) -> ClassResults | None:
    """The results of a method by class; None if it has no predictions.

    Raises:
        UserError: predictions are damaged.
    """
    trials = [trial for row in summary.rows if (trial := read(row)) is not None]
    same = [trial for trial in trials if trial.samples_digest == trials[0].samples_digest]
    if not same:
        return None
    return _of_single_label(same) if same[0].labels.ndim == 1 else _of_multi_label(same)


def _of_single_label(trials: Sequence[Predictions]) -> ClassResults:
    labels, classes = trials[0].labels, trials[0].classes
    found = _Confusions(trials)
    has_matrix = len(classes) <= MOST_IN_MATRIX
    errors = [calibration_error(confidence_bins(trial.logits, trial.labels)) for trial in trials]
    return ClassResults(
        metric="accuracy",
        n_classes=len(classes),
        listed=_worst(found.of_classes()),
        names=classes if has_matrix else (),
        matrix=found.matrix() if has_matrix else (),
        pairs=() if has_matrix else found.pairs[:_MOST_PAIRS],
        bins=confidence_bins(np.concatenate([trial.logits for trial in trials]), np.tile(labels, len(trials))),
        calibration_error=float(np.mean(errors)),
    )


def _of_multi_label(trials: Sequence[Predictions]) -> ClassResults:
    labels, classes = trials[0].labels.astype(bool), trials[0].classes
    listed = [
        ClassResult(
            name=classes[k],
            samples=int(labels[:, k].sum()),
            percent=100 * float(np.mean([average_precision_score(labels[:, k], t.logits[:, k]) for t in trials])),
        )
        for k in np.flatnonzero(labels.any(axis=0)).tolist()
    ]
    return ClassResults(metric="average precision", n_classes=len(classes), listed=_worst(listed))


def _worst(listed: Sequence[ClassResult]) -> list[ClassResult]:
    return sorted(listed, key=lambda result: result.percent)[:_MOST_LISTED]


class _Confusions:
    """How often the samples of each class are taken for which, mean over trials; only what occurs takes memory.

    Attributes:
        pairs: every pair of a class and another one that it is taken for, the most samples first.
    """

    def __init__(self, trials: Sequence[Predictions]) -> None:
        self._classes, n_classes = trials[0].classes, len(trials[0].classes)
        self._of_class = np.bincount(trials[0].labels, minlength=n_classes)
        codes = np.concatenate([trial.labels * n_classes + trial.logits.argmax(axis=1) for trial in trials])
        places, counts = np.unique(codes, return_counts=True)
        self._true, self._predicted = np.divmod(places, n_classes)
        self._counts = counts / len(trials)
        self._percent = 100 * self._counts / self._of_class[self._true]
        order = np.argsort(-self._counts, kind="stable")
        self.pairs = [self._pair(k) for k in order.tolist() if self._true[k] != self._predicted[k]]

    def _pair(self, k: int) -> ConfusedPair:
        return ConfusedPair(
            true=self._classes[self._true[k]],
            predicted=self._classes[self._predicted[k]],
            percent=float(self._percent[k]),
            samples=float(self._counts[k]),
        )

    def matrix(self) -> list[list[float]]:
        """The percentages of all pairs of classes, those of a class with itself too."""
        full = np.zeros((len(self._classes), len(self._classes)))
        full[self._true, self._predicted] = self._percent
        return full.tolist()

    def of_classes(self) -> list[ClassResult]:
        """The results of all classes that have a sample."""
        is_hit = self._true == self._predicted
        percent = dict(zip(self._true[is_hit].tolist(), self._percent[is_hit].tolist(), strict=True))
        most = {pair.true: f"{pair.predicted} ({pair.percent:.0f} %)" for pair in reversed(self.pairs)}
        return [
            ClassResult(
                name=self._classes[k],
                samples=int(self._of_class[k]),
                percent=percent.get(k, 0.0),
                taken_for=most.get(self._classes[k], ""),
            )
            for k in np.flatnonzero(self._of_class).tolist()
        ]
