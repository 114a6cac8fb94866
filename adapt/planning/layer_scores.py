"""Scores the layers of a store, alone and together, by solved probes: which of them are worth storing.

A probe is a ridge regression on some random training samples, each of which is left out once
(`adapt.training.kernel_ridge`). Features enter by their inner products alone, which add up over layers, so that every
layer is read once and any set of layers costs a second. Two readings of a layer are scored: its pooled tokens, which
tell what is shown, and its grid of patches, which tells where.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from adapt.features.cached import StreamedFeatures
from adapt.methods.readout import Readout
from adapt.training.batch_order import Rows
from adapt.training.kernel_ridge import leave_one_out
from adapt.training.metrics import evaluate
from store.console.progress import progress
from store.errors import UserError
from store.layout import in_groups
from store.reader import Store

Reading = Literal["pooled", "grid"]
Kernel = Float64[Tensor, "samples samples"]
MOST_LAYERS = 8  # that are chosen one after the other
_MOST_BYTES = 2 * 10**9  # of the tokens of a layer, as float32
_AT_ONCE = 64  # samples read at once


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """The scores of one reading, in percent: accuracy, or mean average precision of multi-label data.

    Args:
        reading: pooled tokens, or the grid of patches.
        alone: of every layer.
        without: of all layers but this one.
        together: of all layers.
        order: the layers, each the best addition to those before it; at most `MOST_LAYERS`.
        scores: of the first layer of `order`, of the first two, and so on.
        proposed: the fewest first layers of `order` whose score is within one standard error of the best of `scores`.
    """

    reading: Reading
    alone: dict[int, float]
    without: dict[int, float]
    together: float
    order: list[int]
    scores: list[float]
    proposed: list[int]


@dataclass(frozen=True, kw_only=True)
class StoreScores:
    """What `sidecache layers` shows.

    Args:
        store: URL of the store.
        dataset: name of its data set.
        n_samples: training samples that were scored.
        n_classes: number of classes.
        metric: name of the score.
        readings: pooled tokens, and the grid where the store has one.
    """

    store: str
    dataset: str
    n_samples: int
    n_classes: int
    metric: str
    readings: list[LayerScores]

    def document(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)


def score_layers(store: Store, n_samples: int = 1000, seed: int = 0) -> StoreScores:
    """Score the layers of a complete store.

    Args:
        store: the store.
        n_samples: random samples of the training split that are scored, or all if it has fewer; not so many that a
            layer of them takes more than 2 GB.
        seed: of the draw.

    Raises:
        UserError: there are fewer than two classes or samples.
        JobError: shards of the store are missing.
    """
    features = StreamedFeatures(store, torch.device("cpu"))
    rows = _draw(features, n_samples, seed)
    labels = features.labels("train")[torch.from_numpy(rows)]
    judge = Judge(labels, features.num_classes)
    kernels: dict[Reading, dict[int, Kernel]] = {"pooled": {}, "grid": {}}
    with progress("reading layers", len(rows) * len(store.layers), "samples") as advance:
        for layer in store.layers:
            for reading, kernel in _kernels(features, rows, layer, advance):
                kernels[reading][layer] = kernel
    return StoreScores(
        store=store.url,
        dataset=store.schema.dataset,
        n_samples=len(rows),
        n_classes=features.num_classes,
        metric="mean average precision" if features.multi_label else "accuracy",
        readings=[score_kernels(reading, of_layer, judge) for reading, of_layer in kernels.items() if of_layer],
    )


@dataclass(frozen=True)
class Judged:
    """Predictions of samples that were left out."""

    score: float
    error: float  # squared, summed
    is_right: Float[np.ndarray, "samples"]  # the share of a sample's labels that are right

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        return self.score, -self.error


class Judge:
    """Judges kernels by how well the samples that are left out are predicted.

    Args:
        labels: class indices, or multi-label zeros and ones.
        num_classes: number of classes.
    """

    def __init__(self, labels: Shaped[Tensor, "samples ..."], num_classes: int) -> None:
        self._labels = labels
        self._targets = (labels if labels.ndim == 2 else F.one_hot(labels.long(), num_classes)).double()

    def __call__(self, kernel: Kernel) -> Judged:
        """Judge the features of a kernel."""
        predicted = leave_one_out(kernel, self._targets)
        if self._labels.ndim == 2:
            right = ((predicted > 0.5) == (self._targets > 0.5)).double().mean(dim=1)
        else:
            right = (predicted.argmax(dim=1) == self._labels).double()
        error = float((predicted - self._targets).square().sum())
        return Judged(evaluate(predicted - 0.5, self._labels).score(), error, right.numpy())


def score_kernels(reading: Reading, kernels: dict[int, Kernel], judge: Judge) -> LayerScores:
    """Score layers alone, all but one, and one after the other, from their kernels."""
    layers, total = list(kernels), sum(kernels.values(), start=torch.zeros(()).double())
    n_greedy = min(MOST_LAYERS, len(layers))
    n_judged = 2 * len(layers) + 1 + sum(len(layers) - k for k in range(n_greedy))
    with progress(f"scoring {reading} tokens", n_judged, "probes") as advance:

        def judged(kernel: Kernel) -> Judged:
            advance(1)
            return judge(kernel)

        alone = {layer: judged(kernel) for layer, kernel in kernels.items()}
        without = {layer: judged(total - kernels[layer]).score for layer in layers} if len(layers) > 1 else {}
        chosen = list(_greedy(kernels, judged, n_greedy))
        together = judged(total).score
    return LayerScores(
        reading=reading,
        alone={layer: one.score for layer, one in alone.items()},
        without=without,
        together=together,
        order=[layer for layer, _ in chosen],
        scores=[one.score for _, one in chosen],
        proposed=sorted(layer for layer, _ in chosen[: _fewest([one for _, one in chosen])]),
    )


def _greedy(
    kernels: dict[int, Kernel], judged: Callable[[Kernel], Judged], n_layers: int
) -> Iterator[tuple[int, Judged]]:
    """The layers, each the best addition to those before it, with what all up to it are worth."""
    left, total = dict(kernels), torch.zeros(()).double()
    for _ in range(n_layers):
        found = {layer: judged(total + kernel) for layer, kernel in left.items()}
        best = max(found, key=lambda layer: found[layer].rank)
        total = total + left.pop(best)
        yield best, found[best]


def _fewest(chosen: Sequence[Judged]) -> int:
    """How many layers are within one standard error of the best number of them, by the samples that they differ on."""
    best = max(chosen, key=lambda one: one.rank)
    for number, one in enumerate(chosen, start=1):
        lost = best.is_right - one.is_right
        if lost.mean() <= lost.std() / np.sqrt(len(lost)):
            return number
    raise AssertionError("the best is within its own error")


def _draw(features: StreamedFeatures, n_samples: int, seed: int) -> Rows:
    """Random samples, each by its first view."""
    labels = features.labels("train")[:: features.views]
    most = _MOST_BYTES // (4 * features.spec.layout.num_tokens * features.spec.dim)
    rows: Int[np.ndarray, "_"] = np.random.default_rng(seed).permutation(len(labels))[: max(2, min(n_samples, most))]
    if len(rows) < 2 or features.num_classes < 2:
        raise UserError(
            f"{features.store.url} has {len(labels):,} training samples of {features.num_classes} classes: "
            "scores need at least two of each"
        )
    return np.sort(rows) * features.views


def _kernels(
    features: StreamedFeatures, rows: Rows, layer: int, advance: Callable[[int], None]
) -> Iterator[tuple[Reading, Kernel]]:
    """The kernels of a layer: of its pooled tokens, and of its patches if there are several."""
    readout, layout = Readout(features.spec, features.num_classes, "auto", (layer,)), features.spec.layout
    normalized, filled = torch.empty(len(rows), layout.num_tokens, features.spec.dim), 0
    for group, tokens in features.batches("train", in_groups(rows, _AT_ONCE), [layer]):
        normalized[filled : filled + len(group)] = readout.normalize(tokens[layer])
        filled += len(group)
        advance(len(group))
    yield "pooled", _kernel(readout.pool(normalized)[:, None])
    if layout.num_patches > 1:
        yield "grid", _kernel(normalized[:, layout.num_prefix_tokens :])


def _kernel(tokens: Float[Tensor, "samples tokens dim"]) -> Kernel:
    """Inner products of the samples' tokens, every channel centered and scaled alike at all places; mean square 1."""
    spread = tokens.std(dim=(0, 1), correction=0)
    flat = (tokens - tokens.mean(dim=(0, 1))).div_(spread.where(spread > 0, 1.0)).flatten(1)
    kernel = (flat @ flat.T).double()
    return kernel / kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
