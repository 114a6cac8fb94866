"""Classification metrics in percent: accuracies and F1 (single-label), mean average precision and F1 (multi-label).

Averages over classes leave out a class without a sample (single-label) or without a positive (multi-label). Equal
logits are ranked by class index, so that results do not depend on the sorting algorithm.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from sklearn.metrics import average_precision_score
from torch import Tensor

from store.errors import JobError

Counts = Int64[np.ndarray, "classes"]
Labels = Integer[Tensor, "samples"] | Shaped[Tensor, "samples classes"]  # class indices, or 0 and 1 for every class


@dataclass(frozen=True)
class Metrics:
    """Percentages between 0 and 100; None where a metric is not defined."""

    top1: float | None
    top5: float | None
    mean_class_accuracy: float | None
    macro_f1: float | None
    mean_average_precision: float | None

    def score(self, balance_classes: bool = False) -> float:
        """The metric that validation maximizes: mean average precision (multi-label) or accuracy.

        Args:
            balance_classes: whether classes count equally in the accuracy.

        Raises:
            JobError: it is not defined for these labels.
        """
        accuracy = self.mean_class_accuracy if balance_classes else self.top1
        score = self.mean_average_precision if self.top1 is None else accuracy
        if score is None:
            raise JobError("no class has a positive sample among these labels: use a larger data.val_fraction")
        return score


def evaluate(logits: Float[Tensor, "samples classes"], labels: Labels) -> Metrics:
    """Compare logits with class indices (one dimension) or multi-label zeros and ones (two dimensions)."""
    _check(logits, labels)
    scores = logits.detach().cpu()
    scores = scores if scores.dtype == torch.float64 else scores.float()  # NumPy has no bfloat16
    if labels.ndim == 2:
        return _multi_label(scores.numpy(), labels.detach().cpu().numpy().astype(bool))
    return _single_label(scores.numpy(), labels.detach().cpu().numpy().astype(np.int64))


def average_views(logits: Float[Tensor, "rows classes"], views: int) -> Float[Tensor, "samples classes"]:
    """Average logits over the consecutive rows that show the same sample."""
    return logits if views == 1 else logits.reshape(-1, views, logits.shape[1]).mean(dim=1)


def _single_label(scores: Float[np.ndarray, "samples classes"], labels: Int64[np.ndarray, "samples"]) -> Metrics:
    n_classes = scores.shape[1]
    rank = _rank_of_label(scores, labels)
    n_labelled = np.bincount(labels, minlength=n_classes)
    n_hit = np.bincount(labels[rank == 0], minlength=n_classes)
    n_predicted = np.bincount(scores.argmax(axis=1), minlength=n_classes)
    present = n_labelled > 0
    return Metrics(
        top1=_percent(rank < 1),
        top5=_percent(rank < 5) if n_classes > 5 else None,
        mean_class_accuracy=_percent(n_hit[present] / n_labelled[present]),
        macro_f1=_macro_f1(n_hit, n_predicted, n_labelled),
        mean_average_precision=None,
    )


def _multi_label(scores: Float[np.ndarray, "samples classes"], labels: Bool[np.ndarray, "samples classes"]) -> Metrics:
    predicted = scores > 0  # a logit of 0 is a probability of one half
    present = np.flatnonzero(labels.any(axis=0))
    precision = [average_precision_score(labels[:, k], scores[:, k]) for k in present]
    return Metrics(
        top1=None,
        top5=None,
        mean_class_accuracy=None,
        macro_f1=_macro_f1((predicted & labels).sum(axis=0), predicted.sum(axis=0), labels.sum(axis=0)),
        mean_average_precision=_percent(np.array(precision)) if precision else None,
    )


def _rank_of_label(
    scores: Float[np.ndarray, "samples classes"], labels: Int64[np.ndarray, "samples"]
) -> Int64[np.ndarray, "samples"]:
    """How many classes rank before the true one; of equal logits the lower class index ranks first, as in argmax."""
    true_score = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    before = (scores > true_score) | ((scores == true_score) & earlier)
    return np.asarray(before.sum(axis=1), dtype=np.int64)


def _macro_f1(n_hit: Counts, n_predicted: Counts, n_labelled: Counts) -> float | None:
    """Macro F1 from counts; f1_score of scikit-learn 1.6 warns when a small split has many classes."""
    present = n_labelled > 0
    if not present.any():
        return None
    return _percent(2 * n_hit[present] / (n_predicted[present] + n_labelled[present]))


def _percent(fractions: Shaped[np.ndarray, "n"]) -> float:
    return 100 * float(np.mean(fractions))


def _check(logits: Tensor, labels: Tensor) -> None:
    expected = tuple(logits.shape[: labels.ndim])
    if logits.ndim != 2 or labels.ndim not in (1, 2) or tuple(labels.shape) != expected:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not match")
    if logits.numel() == 0:
        raise JobError(f"nothing to evaluate: logits of shape {tuple(logits.shape)}")
    _check_finite(logits)
    if labels.ndim == 2:
        _check_zero_one(labels)
    else:
        _check_range(labels, logits.shape[1])


def _check_finite(logits: Tensor) -> None:
    bad = (~torch.isfinite(logits)).nonzero()
    if len(bad):
        sample, k = bad[0].tolist()
        raise JobError(
            f"{len(bad)} of {logits.numel()} logits are not finite (first: sample {sample}, class {k}, "
            f"value {logits[sample, k].item()}): training has diverged, lower train.lr"
        )


def _check_zero_one(labels: Tensor) -> None:
    bad = ((labels != 0) & (labels != 1)).nonzero()
    if len(bad):
        sample, k = bad[0].tolist()
        raise JobError(f"multi-label values are 0 or 1, not {labels[sample, k].item()} (sample {sample}, class {k})")


def _check_range(labels: Tensor, n_classes: int) -> None:
    bad = ((labels < 0) | (labels >= n_classes)).nonzero()
    if len(bad):
        sample = int(bad[0])
        raise JobError(
            f"label {labels[sample].item()} of sample {sample} is not among the {n_classes} classes of the head"
        )
