"""Measures calibration: how well the confidence of single-label predictions matches their accuracy.

The expected calibration error sorts predictions into bins of equal width by confidence, the probability of the
predicted class, and averages the distance between mean confidence and accuracy over the bins, weighted by their samples
(Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599, equation 3, with its 15 bins).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from scipy.special import softmax

N_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """The samples of one bin, at least one.

    Args:
        low: its lower end, which does not belong to it.
        high: its upper end, which does.
        samples: how many.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
    """

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


def confidence_bins(
    logits: Float[np.ndarray, "samples classes"], labels: Int64[np.ndarray, "samples"]
) -> list[ConfidenceBin]:
    """The bins that have a sample, by rising confidence."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    number = np.clip(np.ceil(confidence * N_BINS).astype(np.int64) - 1, 0, N_BINS - 1)
    return [
        ConfidenceBin(
            low=k / N_BINS,
            high=(k + 1) / N_BINS,
            samples=int((number == k).sum()),
            confidence=float(confidence[number == k].mean()),
            accuracy=float(is_right[number == k].mean()),
        )
        for k in np.unique(number).tolist()
    ]


def calibration_error(bins: Sequence[ConfidenceBin]) -> float:
    """The expected calibration error, in percent."""
    total = sum(each.samples for each in bins)
    return 100 * sum(each.samples * abs(each.confidence - each.accuracy) for each in bins) / total
