"""The training loss: cross-entropy for class indices, binary cross-entropy for multi-label zeros and ones."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from adapt.training.metrics import average_views, evaluate


@dataclass(frozen=True)
class Expansion:
    """A loss with its derivatives in the logits; the Hessian of one sample is diag(rows) - shared rowsᵀ."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "classes batch"]
    rows: Float[Tensor, "classes batch"]
    shared: Float[Tensor, "classes batch"]


@dataclass(frozen=True)
class Objective:
    """A mean loss that can be accumulated over parts of a batch.

    Args:
        multi_label: whether a label is 0/1 for every class instead of one class index.
        weights: of classes (single-label), or of the positives of every class (multi-label).
        views: consecutive rows that show the same sample; validation averages their logits.
    """

    multi_label: bool
    weights: Float[Tensor, "classes"] | None = None
    views: int = 1

    def __call__(
        self,
        logits: Float[Tensor, "part classes"],
        labels: Shaped[Tensor, "part ..."],
        batch_labels: Shaped[Tensor, "batch ..."] | None = None,
        smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """The contribution of a part to the mean loss of a batch.

        Args:
            logits: logits of the part.
            labels: labels of the part.
            batch_labels: labels of the whole batch; None where the part is the batch.
            smoothing: share of every label that is spread evenly over all classes; of multi-label data over 0 and 1.
        """
        weights = self.weights
        count = self._count(labels if batch_labels is None else batch_labels, weights)
        if self.multi_label:
            target = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="sum") / count
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing) / count

    def expand(self, logits: Float[Tensor, "classes batch"], labels: Shaped[Tensor, "batch ..."]) -> Expansion:
        """The loss and its derivatives in the logits; classes come first, which is faster where they are few."""
        weights = logits.new_ones(len(logits)) if self.weights is None else self.weights
        count = self._count(labels, self.weights)
        if self.multi_label:
            p, positive = logits.sigmoid(), labels.T.to(logits.dtype)
            pull, push = positive * weights[:, None] / count, (1 - positive) / count
            loss = -(pull * F.logsigmoid(logits) + push * F.logsigmoid(-logits)).sum()
            return Expansion(loss, push * p - pull * (1 - p), p * (1 - p) * (pull + push), torch.zeros_like(p))
        of_sample, total = weights[labels] / count, logits.logsumexp(dim=0)
        p = (logits - total).exp()
        loss = ((total - logits.gather(0, labels[None])[0]) * of_sample).sum()
        rows = p * of_sample
        return Expansion(loss, rows.scatter_add(0, labels[None], -of_sample[None]), rows, p)

    def separates(self, logits: Float[Tensor, "classes batch"], labels: Shaped[Tensor, "batch ..."]) -> bool:
        """Whether the logits classify every sample correctly: scaled up, they then bring the loss to zero.

        False for a single class.
        """
        if self.multi_label:
            return bool((logits * (2.0 * labels.T - 1) > 0).all())
        others = logits.scatter(0, labels[None], -torch.inf).amax(dim=0)
        return len(logits) > 1 and bool((logits.gather(0, labels[None])[0] > others).all())

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Objective":
        """A copy with its weights on a device."""
        return self if self.weights is None else replace(self, weights=self.weights.to(device, dtype))

    def judge(self, logits: Float[Tensor, "rows classes"], labels: Shaped[Tensor, "rows ..."]) -> tuple[float, float]:
        """(score in percent, minus the unweighted loss) on validation rows; higher is better."""
        logits, labels = average_views(logits, self.views), labels[:: self.views]
        score = evaluate(logits, labels).score(balance_classes=self.weights is not None)
        return score, -float(Objective(self.multi_label)(logits, labels))

    def _count(self, labels: Shaped[Tensor, "batch ..."], weights: Tensor | None) -> Tensor | int:
        """What the sum of the losses is divided by."""
        if self.multi_label or weights is None:
            return labels.numel()
        return weights[labels].sum()


def make_objective(
    labels: Shaped[Tensor, "samples ..."], num_classes: int, multi_label: bool, balance_classes: bool, views: int = 1
) -> Objective:
    """Make the loss for the labels that are trained on; with `balance_classes`, every class has the same weight."""
    return Objective(multi_label, class_weights(labels, num_classes) if balance_classes else None, views)


def class_weights(labels: Shaped[Tensor, "samples ..."], num_classes: int) -> Float[Tensor, "classes"]:
    """Single-label: inverse frequency, with mean 1. Multi-label: negatives per positive."""
    if labels.ndim == 2:
        positive = labels.sum(dim=0).clamp(min=1)
        return (len(labels) - positive) / positive
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return len(labels) / (num_classes * counts)
