"""Trains the trials of one method from one seed; those that read the same layers share one pass over the features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from adapt.config.trials import MethodConfig, Trial
from adapt.features.image_batches import ImageBatches
from adapt.features.pooled import PooledFeatures
from adapt.methods.readout import Readout
from adapt.methods.registry import build_model, find_method
from adapt.training.candidate import Candidate, diverged
from adapt.training.linear_solver import ProbeData, readout_of, solve_heads
from adapt.training.loop import Settings, TrainingTask, fit
from adapt.training.objective import make_objective
from adapt.training.validation_split import draw_validation


@dataclass(frozen=True)
class Trained:
    """Trained candidates in the order of their trials, and how fast they were trained.

    Attributes:
        seconds_per_epoch: of a solved method, the seconds of a pass over the samples.
    """

    candidates: list[Candidate]
    seconds_per_epoch: float
    samples_per_second: float

    @property
    def best(self) -> Candidate:
        """The candidate with the best validation score.

        Raises:
            JobError: all candidates diverged in their first epoch.
        """
        best = max(self.candidates, key=lambda candidate: candidate.rank)
        if best.score == -math.inf:
            raise diverged(candidate.lr for candidate in self.candidates)
        return best


@dataclass(frozen=True)
class TrainingData:
    """What methods are trained from.

    Args:
        pooled: the features, and their pooled values.
        images: the images behind the features, for end-to-end methods; None for the others.
    """

    pooled: PooledFeatures
    images: ImageBatches | None = None

    @property
    def inputs(self) -> Any:
        """The inputs of the models: images, or features."""
        return self.images or self.pooled.features

    @property
    def kind(self) -> str:
        """The value of `feature_source` in results."""
        kind: str = self.inputs.kind
        return kind

    def new_model(self, name: str, trial: Trial, seed: int) -> nn.Module:
        """Build an untrained model, initialized from the seed."""
        features, backbone = self.pooled.features, self.images.backbone if self.images else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs, and is not undone
            return build_model(name, features.spec, features.num_classes, trial.options, backbone=backbone)


def train_trials(
    method: MethodConfig,
    trials: Sequence[Trial],
    data: TrainingData,
    settings: Settings,
    val_fraction: float,
    checkpoint: Path | None = None,
) -> Trained:
    """Train trials of one method from one seed, all on the same rows.

    Args:
        method: the method.
        trials: points of its grid.
        data: what they are trained from.
        settings: hyperparameters, seed included.
        val_fraction: fraction of the training split that is for validation.
        checkpoint: path without suffix for the state of the run; if it exists, training resumes from it.
    """
    seed_trainer = _SeedTrainer(method.name, data, settings, val_fraction)
    candidates = [
        Candidate(data.new_model(method.name, trial, settings.seed), trial.lr, trial.weight_decay) for trial in trials
    ]
    seconds = [
        seed_trainer.train(group, checkpoint.with_suffix(f".{number}.pt") if checkpoint else None)
        for number, group in enumerate(_by_layers(candidates))
    ]
    return Trained(candidates, mean(seconds), len(seed_trainer.rows) / mean(seconds))


def _by_layers(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.layers, []).append(candidate)
    return list(groups.values())


class _SeedTrainer:
    """The rows and the loss of one seed, and training on them in steps or by the solver."""

    def __init__(self, name: str, data: TrainingData, settings: Settings, val_fraction: float) -> None:
        self._name, self._data, self._settings = name, data, settings
        features = data.pooled.features
        self._labels = features.labels("train")
        self.rows, self._val_rows = draw_validation(self._labels, val_fraction, settings.seed, features.views)
        trained_on = self._labels[torch.from_numpy(self.rows)]
        self._objective = make_objective(
            trained_on,
            features.num_classes,
            multi_label=features.multi_label,
            balance_classes=settings.balance_classes,
            views=features.views,
        )

    def train(self, group: Sequence[Candidate], checkpoint: Path | None) -> float:
        """Train candidates that read the same layers; returns the seconds of an epoch, or of a pass of the solver."""
        description = f"{self._name} seed {self._settings.seed}"
        if len(group) > 1:
            description += f" ({len(group)} trials)"
        self._standardize(group)
        if find_method(self._name).solved:
            return self._solve(group, description)
        task = TrainingTask(
            features=self._data.inputs, rows=self.rows, val_rows=self._val_rows, objective=self._objective
        )
        return fit(group, task, self._settings, checkpoint=checkpoint, description=description)

    def _standardize(self, group: Sequence[Candidate]) -> None:
        """Give the read-outs mean and deviation of the training rows, computed once for each pooling."""
        pooled, layer = self._data.pooled, group[0].layers[-1]
        readouts = [readout_of(candidate).to(pooled.features.device) for candidate in group]
        pooled.require("train", layer, readouts)
        rows, first_of_mode = torch.from_numpy(self.rows), dict[str, Readout]()
        for readout in readouts:
            if readout.mode not in first_of_mode:
                values, rounding = pooled.whole("train", layer, readout), pooled.rounding("train", layer, readout)
                readout.standardize(values[rows], rounding)
                first_of_mode[readout.mode] = readout
            first = first_of_mode[readout.mode]
            readout.mean, readout.std = first.mean, first.std

    def _solve(self, group: Sequence[Candidate], description: str) -> float:
        """Solve linear probes, those with the same pooling together; returns the mean seconds of a pass."""
        pooled, layer = self._data.pooled, group[0].layers[-1]
        index, val_index = torch.from_numpy(self.rows), torch.from_numpy(self._val_rows)
        device, labels = pooled.features.device, self._labels
        by_mode: dict[str, list[Candidate]] = {}
        for candidate in group:
            by_mode.setdefault(readout_of(candidate).mode, []).append(candidate)
        seconds = []
        for mode, candidates in by_mode.items():
            values = pooled.whole("train", layer, readout_of(candidates[0]))
            parts = (values[index], labels[index], values[val_index], labels[val_index])
            data = ProbeData(*(part.to(device) for part in parts))
            seconds.append(solve_heads(candidates, data, self._objective, f"{description}, {mode}"))
        return mean(seconds)
