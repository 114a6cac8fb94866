"""Tests how sure the differences between methods are, from their predictions for the same test samples.

The metric of a method is the mean over its seeds. Two methods are compared over the seeds that both have. Only the test
samples are drawn again: an interval says how far the result would move with other test samples, not with other seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from adapt.report.bootstrap import ALPHA, Interval, Score, holm, interval, p_value, resample, score_of
from adapt.report.seed_averages import Summary
from adapt.run_dir.predictions import Predictions
from adapt.run_dir.results import Row
from store.errors import UserError

ReadPredictions = Callable[[Row], Predictions | None]  # None for a trial without predictions
Key = tuple[str, ...]  # see `Summary.trial_ids`


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the test samples say of a method.

    Args:
        interval: of its metric.
        p_value: of its difference from the best method on validation, adjusted after Holm for all methods of the
            comparison; None for the best itself, and where the two have no seed in common.
    """

    interval: Interval
    p_value: float | None = None

    @property
    def is_inside_noise(self) -> bool:
        """Whether the method cannot be told from the best one."""
        return self.p_value is not None and self.p_value > ALPHA


def no_predictions(_: Row) -> None:
    """The predictions of results that stand alone: none."""
    return


def evidence_of(summaries: Sequence[Summary], metric: str, best: Summary, read: ReadPredictions) -> dict[Key, Evidence]:
    """Interval and test against the best method on validation, of the methods that have predictions.

    Args:
        summaries: methods that were evaluated on the same samples.
        metric: the field of `Row` by which they are compared.
        best: one of them.
        read: gives the predictions of a row.

    Raises:
        UserError: predictions are damaged, or of other samples than those of the other methods.
    """
    resampled = ResampledMethods(summaries, metric, read, n_pairs=len(summaries) - 1)
    p_values = resampled.test_pairs([(best.trial_ids, key) for key in resampled.keys if key != best.trial_ids])
    found = {}
    for key in resampled.keys:
        if (covered := resampled.interval(key)) is not None:
            found[key] = Evidence(interval=covered, p_value=p_values.get((best.trial_ids, key)))
    return found


class ResampledMethods:
    """Methods that were evaluated on the same resamples of their test split.

    A method is left out if a seed of it has no predictions, or if its metric is undefined.

    Args:
        summaries: the methods.
        metric: the field of `Row` by which they are compared.
        read: gives the predictions of a row.
        n_pairs: how many pairs will be tested.

    Raises:
        UserError: predictions are damaged, or not all of the same samples.
    """

    def __init__(self, summaries: Sequence[Summary], metric: str, read: ReadPredictions, n_pairs: int) -> None:
        self._seeds: dict[Key, tuple[int, ...]] = {}
        scores: list[Score] = []
        first: Predictions | None = None
        for summary in summaries:
            trials = [read(row) for row in summary.rows] if summary.metrics[metric] else []
            known = [trial for trial in trials if trial is not None]
            if not known or len(known) < len(trials):
                continue
            first = first or known[0]
            for trial in known:
                _require_same_samples(summary, trial, first)
            self._seeds[summary.trial_ids] = summary.seeds
            scores += [score_of(metric, trial) for trial in known]
        self._values = self._split(resample(scores, len(first.sample_ids), n_pairs)) if first else {}

    def _split(self, values: Float[np.ndarray, "trials resamples"]) -> dict[tuple[Key, int], np.ndarray]:
        """The values by method and seed."""
        trials = [(key, seed) for key, seeds in self._seeds.items() for seed in seeds]
        return dict(zip(trials, values, strict=True))

    @property
    def keys(self) -> tuple[Key, ...]:
        """The methods that have predictions."""
        return tuple(self._seeds)

    def interval(self, key: Key) -> Interval | None:
        """The interval of a method."""
        return interval(self._mean(key, self._seeds[key]))

    def test_pairs(self, pairs: Sequence[tuple[Key, Key]]) -> Mapping[tuple[Key, Key], float]:
        """P values of pairs of methods, adjusted for the number of pairs; a pair that cannot be tested is left out."""
        found = {pair: self._p_value(*pair) for pair in pairs}
        tested = {pair: value for pair, value in found.items() if value is not None}
        return dict(zip(tested, holm(list(tested.values())), strict=True))

    def _p_value(self, a: Key, b: Key) -> float | None:
        seeds = sorted({*self._seeds.get(a, ())}.intersection(self._seeds.get(b, ())))
        return p_value(self._mean(a, seeds), self._mean(b, seeds)) if seeds else None

    def _mean(self, key: Key, seeds: Sequence[int]) -> Float[np.ndarray, "resamples"]:
        mean: np.ndarray = np.stack([self._values[key, seed] for seed in seeds]).mean(axis=0)
        return mean


def _require_same_samples(summary: Summary, trial: Predictions, first: Predictions) -> None:
    if trial.samples_digest != first.samples_digest:
        raise UserError(
            f"{summary.label}: the predictions of trial {trial.trial_id} are of other samples, labels or classes than "
            f"those of trial {first.trial_id}: only methods that were tested on the same samples can be compared; "
            "delete the rows of one of the two from results.json"
        )
