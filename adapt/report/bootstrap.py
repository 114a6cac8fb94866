"""Bootstrap over the samples of a test split: how far a metric would move with another test split of the same size.

A resample draws as many samples as the split has, with replacement. All trials of a comparison are evaluated on the
same resamples, so that differences between them are paired: a sample that is hard for all of them moves all of them.
The interval is the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The
test is the paired bootstrap test (Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP
2004), two-sided: twice the share of resamples in which the difference has not its usual sign, with one resample added
to numerator and denominator so that no p value is 0 (Davison and Hinkley, Bootstrap Methods, 1997, section 4.2).

It is written by hand because `scipy.stats.bootstrap` evaluates a metric on each resample again; here a metric is a few
sparse matrix products with the counts of the samples in many resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from scipy import sparse

from adapt.run_dir.predictions import Predictions

ALPHA = 0.05  # the level of tests; intervals cover 1 - ALPHA
_RESAMPLES = 2_000
_RESAMPLES_A_PAIR = 100  # Holm multiplies the smallest p value, 2 / resamples, by the number of pairs: 0.02 at most
_BLOCK = 2**19  # counts that are held at once

Counts = Float32[np.ndarray, "samples resamples"]  # how often each resample has each sample
Score = Callable[[Counts], Float[np.ndarray, "resamples"]]  # a metric of one trial in percent; NaN where undefined


@dataclass(frozen=True)
class Interval:
    """A percentile interval of a metric, in percent."""

    low: float
    high: float


def score_of(metric: str, trial: Predictions) -> Score:
    """A metric of one trial as a function of the counts; the predictions may be deleted then.

    Args:
        metric: `top1`, `mean_class_accuracy` or `mean_average_precision`.
        trial: the predictions.
    """
    return _SCORES[metric](trial)


def resample(scores: Sequence[Score], n_samples: int, n_pairs: int) -> Float[np.ndarray, "trials resamples"]:
    """Values of trials on the same resamples of their test split, without those on which a value is undefined.

    Args:
        scores: one a trial.
        n_samples: size of the test split.
        n_pairs: how many pairs will be tested; more resamples are drawn for many.
    """
    n_resamples = max(_RESAMPLES, _RESAMPLES_A_PAIR * n_pairs)
    blocks = [np.stack([score(counts) for score in scores]) for counts in _draw(n_samples, n_resamples)]
    values = np.concatenate(blocks, axis=1)
    return values[:, np.isfinite(values).all(axis=0)]


def interval(values: Float[np.ndarray, "resamples"]) -> Interval | None:
    """The interval of a metric from its values on the resamples; None if it is undefined on all of them."""
    if not values.size:
        return None
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(low), float(high))


def p_value(a: Float[np.ndarray, "resamples"], b: Float[np.ndarray, "resamples"]) -> float:
    """The two-sided p value of the difference between two metrics on the same resamples."""
    difference = np.round(a - b, 9)  # means over seeds that are equal may differ in their last bit
    not_positive, not_negative = np.sum(difference <= 0), np.sum(difference >= 0)
    return min(1.0, float(2 * (1 + min(not_positive, not_negative)) / (1 + difference.size)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of a family of tests, adjusted after Holm (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def _draw(n_samples: int, n_resamples: int) -> Iterator[Counts]:
    """The counts of all resamples, block by block; the same ones for every split of this size."""
    generator = np.random.default_rng(0)
    width = max(1, _BLOCK // n_samples)
    for start in range(0, n_resamples, width):
        n_columns = min(width, n_resamples - start)
        drawn = generator.integers(0, n_samples, size=(n_samples, n_columns)) * n_columns + np.arange(n_columns)
        counts = np.bincount(drawn.reshape(-1), minlength=n_samples * n_columns)
        yield counts.reshape(n_samples, n_columns).astype(np.float32)


def _top1(trial: Predictions) -> Score:
    hits = _hits(trial).astype(np.float32)
    return lambda counts: 100.0 * (hits @ counts).astype(np.float64) / len(hits)


def _mean_class_accuracy(trial: Predictions) -> Score:
    """Classes without a sample in a resample are left out of its mean."""
    labels, hits = trial.labels, np.flatnonzero(_hits(trial))
    shape = (len(trial.classes), len(labels))
    all_of_class = _sums(labels, np.arange(len(labels)), shape)
    hits_of_class = _sums(labels[hits], hits, shape)
    return lambda counts: 100.0 * _mean_ratio(hits_of_class @ counts, all_of_class @ counts)


def _mean_average_precision(trial: Predictions) -> Score:
    """Classes without a positive in a resample are left out of its mean."""
    labels, logits = trial.labels.astype(bool).T, trial.logits.T
    classes = [_average_precision(*of_class) for of_class in zip(labels, logits, strict=True)]
    present = [of_class for of_class in classes if of_class is not None]

    def score(counts: Counts) -> Float[np.ndarray, "resamples"]:
        numerators, positives = zip(*(of_class(counts) for of_class in present), strict=True)
        return 100.0 * _mean_ratio(np.stack(numerators), np.stack(positives))

    return score if present else lambda counts: np.full(counts.shape[1], np.nan)


_SCORES: dict[str, Callable[[Predictions], Score]] = {
    "top1": _top1,
    "mean_class_accuracy": _mean_class_accuracy,
    "mean_average_precision": _mean_average_precision,
}


def _average_precision(
    labels: Bool[np.ndarray, "samples"], scores: Float32[np.ndarray, "samples"]
) -> Callable[[Counts], tuple[Float[np.ndarray, "resamples"], Float[np.ndarray, "resamples"]]] | None:
    """Average precision of a class as numerator and number of positives; None if it has no positive.

    The samples are ordered by falling score. Precision counts where recall rises: at the last sample of each group of
    equal scores that has a positive. A segment goes from behind one of these places up to the next.
    """
    order = np.argsort(-scores, kind="stable")
    rising = scores[order][::-1]
    last_of_group = len(scores) - 1 - np.searchsorted(rising, scores[order], side="left")
    positive = labels[order]
    if not positive.any():
        return None
    ends = np.unique(last_of_group[positive])
    segment = np.searchsorted(ends, np.arange(len(scores)))
    shape, is_counted = (len(ends), len(scores)), segment < len(ends)
    in_segment = _sums(segment[is_counted], order[is_counted], shape)
    positives_in_segment = _sums(segment[positive], order[positive], shape)

    def parts(counts: Counts) -> tuple[Float[np.ndarray, "resamples"], Float[np.ndarray, "resamples"]]:
        found = positives_in_segment @ counts
        precision = _ratio(_cumulate(found), _cumulate(in_segment @ counts))
        return (found * precision).sum(axis=0), found.sum(axis=0)

    return parts


def _hits(trial: Predictions) -> Bool[np.ndarray, "samples"]:
    return np.asarray(trial.logits.argmax(axis=1) == trial.labels)


def _sums(rows: np.ndarray, samples: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """The matrix that adds up the counts of these samples into these rows."""
    return sparse.csr_array((np.ones(len(rows), np.float32), (rows, samples)), shape=shape)


def _cumulate(values: np.ndarray) -> np.ndarray:
    """Sums over the rows up to each; torch takes a third of NumPy's time for the first axis."""
    sums: np.ndarray = torch.from_numpy(values).cumsum(dim=0).numpy()
    return sums


def _mean_ratio(
    numerators: Float[np.ndarray, "classes resamples"], denominators: Float[np.ndarray, "classes resamples"]
) -> Float[np.ndarray, "resamples"]:
    """The mean ratio over the classes with a denominator; NaN where no class has one."""
    n_classes = (denominators > 0).sum(axis=0)
    total = _ratio(numerators, denominators).sum(axis=0, dtype=np.float64)
    mean: np.ndarray = np.divide(total, n_classes, out=np.full(len(total), np.nan), where=n_classes > 0)
    return mean


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0."""
    ratio: np.ndarray = np.divide(numerators, denominators, out=np.zeros_like(numerators), where=denominators > 0)
    return ratio
