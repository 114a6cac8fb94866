"""Choosing lr, weight decay and options on validation data; a grid over features is trained in one pass over them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from adapt.config.pipeline import MethodConfig, Trial
from adapt.features.image_batches import ImageBatches
from adapt.features.pooled import PooledFeatures
from adapt.methods.readout import Readout
from adapt.methods.registry import build_model, find_method
from adapt.run_dir.files import damaged, read_json, write_json
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import Pooled, readout_of, solve_heads
from adapt.training.loop import Settings, fit
from adapt.training.objective import make_objective
from adapt.training.validation_split import draw_validation
from store.errors import JobError

_WIDENINGS = 3  # of a grid whose best point lies at its edge


@dataclass(frozen=True)
class Trained:
    """Candidates after a pass, in the order of their trials, and what the pass cost."""

    candidates: list[Candidate]
    seconds_per_epoch: float  # of a solved method: a pass over the samples
    samples_per_second: float

    @property
    def best(self) -> Candidate:
        """The one that validation likes best.

        Raises:
            JobError: all of them diverged in their first epoch.
        """
        best = max(self.candidates, key=lambda candidate: candidate.rank)
        if best.score == -math.inf:
            raise diverged(self.candidates)
        return best


@dataclass(frozen=True)
class Material:
    """What methods are trained from.

    Args:
        pooled: pooled features, with the features they were made from.
        images: what end-to-end methods need beside them; None for the others.
    """

    pooled: PooledFeatures
    images: ImageBatches | None = None

    @property
    def inputs(self) -> Any:
        """What a model is given: images, or the features themselves."""
        return self.images or self.pooled.features

    @property
    def kind(self) -> str:
        """How results name them."""
        kind: str = self.inputs.kind
        return kind

    def new_model(self, name: str, trial: Trial, seed: int) -> nn.Module:
        """A fresh model whose every draw comes from the seed."""
        features, backbone = self.pooled.features, self.images.backbone if self.images else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and not a GPU's, which would not be put back
            return build_model(name, features.spec, features.num_classes, trial.options, backbone=backbone)


def train_trials(
    method: MethodConfig,
    trials: Sequence[Trial],
    material: Material,
    settings: Settings,
    val_fraction: float,
    checkpoint: Path | None = None,
) -> Trained:
    """Train trials of one method from one seed, all on the same rows.

    Args:
        checkpoint: where an interrupted pass keeps its state.
    """
    run = _Pass(method.name, material, settings, val_fraction)
    candidates = [
        Candidate(material.new_model(method.name, trial, settings.seed), trial.lr, trial.weight_decay)
        for trial in trials
    ]
    seconds = [
        run.train(group, checkpoint.with_suffix(f".{number}.pt") if checkpoint else None)
        for number, group in enumerate(_by_layers(candidates))
    ]
    return Trained(candidates, mean(seconds), len(run.rows) / mean(seconds))


def _by_layers(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.layers, []).append(candidate)
    return list(groups.values())


class _Pass:
    """The rows and the objective of one seed, and the two ways of training on them."""

    def __init__(self, name: str, material: Material, settings: Settings, val_fraction: float) -> None:
        self._name, self._material, self._settings = name, material, settings
        features = material.pooled.features
        self._labels = features.labels("train")
        self.rows, self._val_rows = draw_validation(self._labels, val_fraction, settings.seed, features.views)
        trained_on = self._labels[torch.from_numpy(self.rows)]
        balance = settings.balance_classes
        self._objective = make_objective(
            trained_on, features.num_classes, features.multi_label, balance, features.views
        )

    def train(self, group: Sequence[Candidate], checkpoint: Path | None) -> float:
        """Train candidates that read the same layers; returns the seconds of an epoch, or of a pass."""
        what = f"{self._name} seed {self._settings.seed}" + (f" ({len(group)} trials)" if len(group) > 1 else "")
        self._standardize(group)
        if find_method(self._name).solved:
            return self._solve(group, what)
        return fit(
            group, self._material.inputs, self.rows, self._val_rows, self._settings, self._objective, checkpoint, what
        )

    def _standardize(self, group: Sequence[Candidate]) -> None:
        pooled, layer = self._material.pooled, group[0].layers[-1]
        readouts = [readout_of(candidate).to(pooled.features.device) for candidate in group]
        pooled.require("train", layer, readouts)
        rows, of_mode = torch.from_numpy(self.rows), dict[str, Readout]()
        for readout in readouts:
            alike = of_mode.setdefault(readout.mode, readout)
            if alike is readout:
                values, rounding = pooled.whole("train", layer, readout), pooled.rounding("train", layer, readout)
                readout.standardize(values[rows], rounding)
            readout.mean, readout.std = alike.mean, alike.std

    def _solve(self, group: Sequence[Candidate], what: str) -> float:
        pooled, layer = self._material.pooled, group[0].layers[-1]
        index, val_index = torch.from_numpy(self.rows), torch.from_numpy(self._val_rows)
        device, labels = pooled.features.device, self._labels
        by_pooling: dict[str, list[Candidate]] = {}
        for candidate in group:
            by_pooling.setdefault(readout_of(candidate).mode, []).append(candidate)
        seconds = []
        for mode, candidates in by_pooling.items():
            values = pooled.whole("train", layer, readout_of(candidates[0]))
            parts = (values[index], labels[index], values[val_index], labels[val_index])
            data = Pooled(*(part.to(device) for part in parts))
            seconds.append(solve_heads(candidates, data, self._objective, f"{what}, {mode}"))
        return mean(seconds)


Run = Callable[[Sequence[Trial], str], Trained]
_Number = Annotated[float, Field(ge=-math.inf)]  # which nan is not; minus infinity is a trial that diverged


class Point(BaseModel):
    """A trial of the grid, and what validation says of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    options: dict[str, Any]
    lr: float | None
    weight_decay: float
    score: _Number
    loss: _Number
    epoch: int


Points = dict[Annotated[int, Field(strict=False)], Point]  # by the trial's position in the grid


class _Scores(BaseModel):
    """A file of scores; `search` is its own name, so that no other search's file is taken for it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    search: str
    method: str
    points: Points


def choose_trial(method: MethodConfig, run: Run, kept: Path) -> Trial:
    """The best trial of the grid on validation; a best at the edge of its learning rates or weight decays widens it.

    Args:
        run: trains some trials; its second argument is a name for the pass.
        kept: a file that keeps scores as they come, so that none is computed twice.

    Raises:
        JobError: training diverged at every point; the file is damaged.
    """
    trials = list(method.trials)
    if len(trials) == 1:
        return trials[0]
    points = read_points(kept)
    for _ in range(1 + _WIDENINGS):
        for todo in _passes(method, [index for index in range(len(trials)) if index not in points]):
            candidates = run([trials[index] for index in todo], str(todo[0])).candidates
            points |= {index: _point(trials[index], c) for index, c in zip(todo, candidates, strict=True)}
            scores = _Scores(search=kept.stem, method=method.name, points=points)
            write_json(kept, scores.model_dump())
        best = max(range(len(trials)), key=lambda index: (points[index].score, -points[index].loss))
        if points[best].score == -math.inf:
            raise diverged(trials)
        trials += beyond_the_edge(trials, trials[best])
    return trials[best]


def read_points(kept: Path) -> Points:
    """The scores of a search so far.

    Raises:
        JobError: the file is damaged, or another search's.
    """
    if not kept.exists():
        return {}
    try:
        scores = _Scores.model_validate(read_json(kept))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(kept, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if scores.search != kept.stem:
        raise damaged(kept, f"it holds the scores of the search {scores.search}")
    return scores.points


def diverged(tried: Sequence[Trial] | Sequence[Candidate]) -> JobError:
    """What there is to say where no epoch of any candidate gave finite logits."""
    rates = ", ".join(f"{rate:g}" for rate in sorted({one.lr for one in tried if one.lr}))
    return JobError(f"training diverged in its first epoch at learning rates {rates}; lower train.lr")


def beyond_the_edge(trials: Sequence[Trial], best: Trial) -> list[Trial]:
    """The next steps of a logarithmic grid (of three values and more) where the best has no neighbor on one side."""
    more = []
    for axis in ("lr", "weight_decay"):
        values = sorted({value for trial in trials if (value := getattr(trial, axis))})
        if len(values) < 3 or getattr(best, axis) not in (values[0], values[-1]):
            continue
        edge, inner = (values[0], values[1]) if getattr(best, axis) == values[0] else (values[-1], values[-2])
        more.append(best.model_copy(update={axis: edge * edge / inner}))
    return more


def _passes(method: MethodConfig, todo: list[int]) -> list[list[int]]:
    """All trials in one pass, or each in its own where each needs a backbone of its own."""
    if find_method(method.name).trains_backbone:
        return [[index] for index in todo]
    return [todo] if todo else []


def _point(trial: Trial, candidate: Candidate) -> Point:
    facts = trial.model_dump(mode="json", serialize_as_any=True)
    return Point(**facts, score=candidate.score, loss=candidate.loss, epoch=candidate.best_epoch)
