"""Tests how sure the differences between methods are, from their predictions for the same test samples.

The metric of a method is the mean over its seeds. Two methods are compared over the seeds that both have. Only the test
samples are drawn again: an interval says how far the result would move with other test samples, not with other seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from adapt.report.bootstrap import ALPHA, Interval, holm, interval, p_value, resample, score_of
from adapt.report.seed_averages import Summary
from adapt.run_dir.predictions import Predictions
from adapt.run_dir.results import Row

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
        UserError: predictions are damaged.
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

    A method is left out if a seed of it has no predictions, if its metric is undefined, or if its seeds were tested on
    different samples. Methods that were tested on other samples, labels or classes than each other are never compared.

    Args:
        summaries: the methods.
        metric: the field of `Row` by which they are compared.
        read: gives the predictions of a row.
        n_pairs: how many pairs will be tested.

    Raises:
        UserError: predictions are damaged.
    """

    def __init__(self, summaries: Sequence[Summary], metric: str, read: ReadPredictions, n_pairs: int) -> None:
        self._seeds: dict[Key, tuple[int, ...]] = {}
        self._samples: dict[Key, str] = {}
        by_samples: dict[str, list[tuple[Summary, list[Predictions]]]] = {}
        for summary in summaries:
            trials = [read(row) for row in summary.rows] if summary.metrics[metric] else []
            known = [trial for trial in trials if trial is not None]
            digests = {trial.samples_digest for trial in known}
            if len(digests) == 1 and len(known) == len(trials):
                self._seeds[summary.trial_ids], [self._samples[summary.trial_ids]] = summary.seeds, digests
                by_samples.setdefault(self._samples[summary.trial_ids], []).append((summary, known))
        self._values: dict[tuple[Key, int], np.ndarray] = {}
        for methods in by_samples.values():
            scores = [score_of(metric, trial) for _, known in methods for trial in known]
            values = resample(scores, len(methods[0][1][0].sample_ids), n_pairs)
            trials_of = [(summary.trial_ids, seed) for summary, _ in methods for seed in summary.seeds]
            self._values |= dict(zip(trials_of, values, strict=True))

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
        if not seeds or self._samples[a] != self._samples[b]:
            return None
        return p_value(self._mean(a, seeds), self._mean(b, seeds))

    def _mean(self, key: Key, seeds: Sequence[int]) -> Float[np.ndarray, "resamples"]:
        mean: np.ndarray = np.stack([self._values[key, seed] for seed in seeds]).mean(axis=0)
        return mean
