"""Times training steps with the training loop itself, on a small store of random values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.features.feature_source import Features
from adapt.job.trial_count import MethodTrials
from adapt.job.trial_run import settings_of
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.options import MethodOptions
from adapt.methods.registry import build_model
from adapt.planning.laps import lap
from adapt.training.candidate import Candidate
from adapt.training.loop import TrainingPass, fit
from adapt.training.objective import make_objective
from adapt.training.seed_rows import SeedRows

_MOST_TOGETHER = 6  # trials that are timed together; more take proportionally longer
_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds a sample of an epoch of a method's trials, trained together from resident features.

    Args:
        points: of all points of its search.
        seeds: of the chosen point, from all seeds.
    """

    points: float
    seeds: float


def step_seconds(features: Features, method: MethodConfig, config: Config) -> float:
    """Seconds a sample of an epoch of the method's first trial, on all layers of the features."""
    return _epoch_seconds(features, method, config, [(method.trials[0], config.train.seeds[0])])


def seconds_of_trials(features: Features, trials: MethodTrials, config: Config, spec: FeatureSpec) -> StepSeconds:
    """The time of a method's trials.

    Args:
        features: some layers of a few samples.
        trials: of the method.
        config: the configuration of the job.
        spec: all features of the job; the time is proportional to the layers that the method reads of them.
    """
    method, seed = trials.method, config.train.seeds[0]
    ratio = len(layers_of(method, spec)) / len(features.spec.layers) if _reads_layers(method.trials[0]) else 1.0

    def together(pairs: Sequence[tuple[Trial, int]]) -> float:
        timed = pairs[:_MOST_TOGETHER]
        return ratio * _epoch_seconds(features, method, config, timed) * len(pairs) / len(timed)

    points = [(trial, seed) for trial in method.trials]
    return StepSeconds(
        points=together(points) if trials.points else 0.0,
        seeds=together([(method.trials[0], number) for number in config.train.seeds]),
    )


def layers_of(method: MethodConfig, spec: FeatureSpec) -> tuple[int, ...]:
    """The layers that a method reads."""
    with torch.device("meta"):
        layers: tuple[int, ...] = build_model(method.name, spec, 2, method.trials[0].options).layers  # type: ignore[assignment]
    return layers


def _reads_layers(trial: Trial) -> bool:
    return "layers" in type(trial.options).model_fields


def _epoch_seconds(
    features: Features, method: MethodConfig, config: Config, pairs: Sequence[tuple[Trial, int]]
) -> float:
    """Seconds a sample of one epoch of some trials, each from a seed, on all layers of the features."""
    labels, settings = features.labels("train"), replace(settings_of(config, method), epochs=1, solve_head=None)
    rows = np.arange(min(len(labels), _BATCHES * settings.batch_size))
    objective = make_objective(labels, features.num_classes, features.multi_label, balance_classes=False)
    seeds = {
        seed: SeedRows(seed=seed, rows=rows, val_rows=rows[:1], objective=objective)
        for seed in dict.fromkeys(seed for _, seed in pairs)
    }
    candidates = [
        Candidate(
            build_model(method.name, features.spec, features.num_classes, _on_layers(trial, features.spec)),
            trial.lr or config.train.lr,
            trial.weight_decay,
            data=seeds[seed],
            method=method.name,
        )
        for trial, seed in pairs
    ]
    task = TrainingPass(candidates=candidates, inputs=features, settings=settings)
    return lap(lambda: fit(task), features.device) / len(rows)


def _on_layers(trial: Trial, spec: FeatureSpec) -> MethodOptions:
    """The options of a trial, on layers that the features have."""
    fields, changes = type(trial.options).model_fields, dict[str, Any]()
    if "layers" in fields:
        changes["layers"] = "all"
    if "layer" in fields:
        changes["layer"] = spec.layers[-1]
    return trial.options.model_copy(update=changes)
