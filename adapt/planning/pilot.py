"""The pilot: finds out on some training samples of a job which preset of `store:` it needs.

The samples go through the backbone once. From what each preset would store of them two methods are trained, one for
what is shown, the linear probe of all stored layers, and one for where it is, the convolutional ladder. Every training
holds out a fifth of the samples, drawn anew by each of several seeds, the same for all presets. Chosen is the smallest
preset whose held-out accuracy is not behind that of the best beyond the noise (one-sided, level 0.05).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict

from adapt.config.pipeline import Config
from adapt.config.trials import parse_trial
from adapt.features.feature_source import Rows
from adapt.features.held import HeldFeatures, hold
from adapt.features.pooled import PooledFeatures
from adapt.job.checks import require_trainable
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_logits
from adapt.training.metrics import average_views, evaluate
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from extract.backbones.backbone import Backbone
from extract.forward.device import resolve_device
from store.config import PRESETS, StoreConfig
from store.dtypes import bytes_per_token
from store.errors import UserError
from store.layout import reduced_layout, resolve_layers

SAMPLES = 400
_SAMPLES_A_CLASS, _MOST_SAMPLES = 8, 2000
_DEVIATIONS = 1.645  # of a normal distribution that leave 0.05 beyond
_DRAW = RowDraw(val_fraction=0.2)
_SEEDS = range(5)
_EPOCHS, _VISITS = 15, 4800  # at the least: epochs, and samples trained on, one after the other
_LEARNERS: dict[str, list[dict[str, Any]]] = {
    "linear_probe": [{"layers": "all", "weight_decay": decay} for decay in (0.1, 0.001, 0.00001)],
    "conv_ladder": [{"lr": 0.003, "weight_decay": 0.01}],
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PresetScore(_Frozen):
    """What a preset is worth on the samples of a pilot, in percent.

    Attributes:
        preset: its name.
        bytes_per_sample: stored bytes of a sample.
        scores: held-out accuracy (multi-label: mean average precision) by method.
        behind: points by which it is behind the best preset (multi-label: in the share of labels that are right).
        error: standard error of `behind`.
        reason: why the methods of the job cannot be trained from it; empty if they can.
    """

    preset: str
    bytes_per_sample: int
    scores: dict[str, float]
    behind: float
    error: float
    reason: str = ""

    @property
    def suffices(self) -> bool:
        """Whether it is within the noise of the best."""
        return self.behind <= _DEVIATIONS * self.error


class Pilot(_Frozen):
    """The outcome of a pilot.

    Attributes:
        dataset: name of the data set.
        n_samples: training samples that went through the backbone.
        metric: name of the scores.
        presets: what each is worth, the smallest first.
        chosen: the smallest that suffices, of those that the methods of the job can be trained from.
        seconds: that it took.
    """

    dataset: str
    n_samples: int
    metric: Literal["accuracy", "mean average precision"]
    presets: list[PresetScore]
    chosen: str
    seconds: float


def run_pilot(config: Config, inputs: Inputs) -> Pilot:
    """Find the smallest preset that suffices for the samples of a job.

    Args:
        config: options of `store:` that it sets take precedence over those of the presets.
        inputs: its samples and backbone.

    Raises:
        UserError: there are too few samples or classes; a sample cannot be decoded; the methods of the job cannot be
            trained from any preset.
        JobError: a value cannot be stored.
    """
    started = time.perf_counter()
    stores = {preset: config.store.at_preset(preset) for preset in PRESETS}
    reasons = {preset: _obstacle(config, store, inputs.own_backbone) for preset, store in stores.items()}
    if all(reasons.values()):
        raise UserError(reasons["full"])
    source, rows = inputs.source, _draw_rows(inputs)
    known = _judge_presets(config, inputs, rows, stores)
    scores = [
        _score(known, preset, n_bytes=_bytes_a_sample(inputs.backbone, store), reason=reasons[preset])
        for preset, store in stores.items()
    ]
    scores.sort(key=attrgetter("bytes_per_sample"))
    return Pilot(
        dataset=source.name,
        n_samples=len(rows) // source.views,
        metric="mean average precision" if source.multi_label else "accuracy",
        presets=scores,
        chosen=_choose(scores),
        seconds=time.perf_counter() - started,
    )


def _score(known: Mapping[str, Mapping[str, "_HeldOut"]], preset: str, n_bytes: int, reason: str) -> PresetScore:
    """What a preset is worth, compared with the best of all."""
    best = {name: max(found.values(), key=attrgetter("score")) for name, found in known.items()}
    first = max(best.values(), key=attrgetter("score"))
    return PresetScore(
        preset=preset,
        bytes_per_sample=n_bytes,
        scores={method: one.score for method, one in known[preset].items()},
        behind=best[preset].behind(first),
        error=best[preset].error(first),
        reason=reason,
    )


def _judge_presets(
    config: Config, inputs: Inputs, rows: Rows, stores: Mapping[str, StoreConfig]
) -> dict[str, dict[str, "_HeldOut"]]:
    """Held-out predictions by preset and method; of `full` those of what the methods read of it."""
    smaller = {preset: store for preset, store in stores.items() if preset != "full"}
    device = resolve_device(config.train.device)
    held = hold(extraction_job(config, inputs), rows, smaller, device=device)
    known = {preset: _cross_validate(features) for preset, features in held.items()}
    return known | {"full": known["grid"] | known["probe"]}


def _obstacle(config: Config, store: StoreConfig, own_backbone: Backbone | None) -> str:
    """Why the methods of a job cannot be trained from a store; empty if they can."""
    try:
        require_trainable(config.model_copy(update={"store": store}), own_backbone)
    except UserError as error:
        return str(error)
    return ""


def _draw_rows(inputs: Inputs) -> Rows:
    """Random samples of the training split, in all their views."""
    source, views = inputs.source, inputs.source.views
    n_samples = len(source.splits["train"]) // views
    if n_samples < 10 or len(source.classes) < 2:
        raise UserError(
            f"a pilot needs at least 10 training samples of 2 classes; {source.name} has {n_samples} of "
            f"{len(source.classes)}: set store.preset to {', '.join(PRESETS)}"
        )
    wanted = min(max(SAMPLES, _SAMPLES_A_CLASS * len(source.classes)), _MOST_SAMPLES)
    samples = np.sort(np.random.default_rng(0).permutation(n_samples)[:wanted])
    return (samples[:, None] * views + np.arange(views)).ravel()


def _bytes_a_sample(backbone: Backbone, store: StoreConfig) -> int:
    tokens = reduced_layout(backbone.layout, store.tokens).num_tokens
    return len(resolve_layers(store.layers, backbone.depth)) * tokens * bytes_per_token(store.dtype, backbone.dim)


@dataclass(frozen=True)
class _HeldOut:
    """Predictions of held-out samples, one seed after the other."""

    score: float
    samples: Rows  # number of each; a sample may be held out by several seeds
    is_right: Float[np.ndarray, "held_out"]  # the share of a sample's labels that are right

    def behind(self, other: "_HeldOut") -> float:
        """Points by which this is behind another."""
        return 100 * float(np.mean(other.is_right - self.is_right))

    def error(self, other: "_HeldOut") -> float:
        """The standard error of `behind`; a sample counts once, however many seeds hold it out."""
        lost = other.is_right - self.is_right
        by_sample = np.bincount(self.samples, weights=lost - lost.mean())
        return 100 * float(np.sqrt(np.square(by_sample).sum()) / len(lost))


def _cross_validate(features: HeldFeatures) -> dict[str, _HeldOut]:
    """Train every method that can be trained from some features, and predict what each seed holds out."""
    data, found = TrainingData(PooledFeatures(features)), dict[str, _HeldOut]()
    epochs = max(_EPOCHS, math.ceil(_VISITS / len(features.labels("train"))))
    settings = Settings(epochs=epochs, batch_size=32, keep="last")
    for method, points in _LEARNERS.items():
        if method == "conv_ladder" and features.spec.layout.num_patches < 2:
            continue
        entries = [
            Entry(method=method, trial=parse_trial(method, point), seed=seed, settings=settings)
            for point in points
            for seed in _SEEDS
        ]
        trained = train_entries(entries, data, _DRAW)
        of_points = list(_predictions(trained, features))
        if of_points:
            found[method] = max(of_points, key=attrgetter("score"))
    return found


def _predictions(trained: Sequence[Candidate], features: HeldFeatures) -> Iterator[_HeldOut]:
    """Of every point, from the candidates of its seeds; of none that has diverged."""
    logits = predict_logits(trained, features, "train", [candidate.data.val_rows for candidate in trained])
    n_seeds, views = len(_SEEDS), features.views
    samples = [candidate.data.val_rows[::views] // views for candidate in trained]
    for start in range(0, len(trained), n_seeds):
        of_seeds = range(start, start + n_seeds)
        predicted = torch.cat([average_views(logits[k], views) for k in of_seeds])
        if not predicted.isfinite().all():
            continue
        held_out = np.concatenate([samples[k] for k in of_seeds])
        labels = features.labels("train")[::views][torch.from_numpy(held_out)]
        yield _HeldOut(evaluate(predicted, labels).score(), held_out, _is_right(predicted, labels))


def _is_right(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    if labels.ndim == 2:
        return ((logits > 0) == (labels > 0)).double().mean(dim=1).numpy()
    return (logits.argmax(dim=1) == labels).double().numpy()


def _choose(scores: Sequence[PresetScore]) -> str:
    """The smallest preset that suffices; if the methods cannot be trained from any of these, the least behind."""
    possible = [score for score in scores if not score.reason]
    enough = [score.preset for score in possible if score.suffices]
    return enough[0] if enough else min(possible, key=lambda score: score.behind).preset
