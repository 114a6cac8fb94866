"""Choosing lr, weight decay and options on validation data, every point of a grid in one pass over the features."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapt.config import MethodConfig, Trial
from adapt.features import Features, PooledFeatures
from adapt.methods import build_model
from adapt.probes import LinearProbe
from adapt.results import write_atomically
from adapt.split import draw_validation
from adapt.train import Batches, Candidate, Settings, Speed, fit


@dataclass(frozen=True)
class Trained:
    """Candidates after a pass, in the order of their trials, and what the pass cost."""

    candidates: list[Candidate]
    speed: Speed
    inputs: Batches


def train_trials(
    method: MethodConfig,
    trials: Sequence[Trial],
    features: Features,
    settings: Settings,
    val_fraction: float,
    checkpoint: Path | None = None,
) -> Trained:
    """Train trials of one method from one seed, all on the same batches."""
    rows, val_rows = draw_validation(features.labels("train"), val_fraction, settings.seed)
    candidates = [
        Candidate(seeded_model(method.name, features, trial, settings.seed), trial.lr, trial.weight_decay)
        for trial in trials
    ]
    by_layers: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        by_layers.setdefault(candidate.model.layers, []).append(candidate)  # type: ignore[arg-type]
    inputs: Batches = features
    for number, (layers, group) in enumerate(by_layers.items()):
        readouts: list[Any] = [candidate.model.readout.to(features.device) for candidate in group]
        pooled = PooledFeatures(features, readouts, layers[-1])
        for readout in readouts:
            readout.standardise(pooled.whole("train")[readout.mode][torch.from_numpy(rows)])
        inputs = pooled if isinstance(group[0].model, LinearProbe) else features
        file = checkpoint.with_suffix(f".{number}.pt") if checkpoint else None
        what = f"{method.name} seed {settings.seed}" + (f" ({len(group)} trials)" if len(group) > 1 else "")
        speed = fit(group, inputs, rows, val_rows, settings, file, what)
    return Trained(candidates, speed, inputs)


def seeded_model(name: str, features: Features, trial: Trial, seed: int) -> nn.Module:
    """A fresh model whose every draw comes from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(name, features.spec, features.num_classes, trial.options)


def choose_trial(method: MethodConfig, run: Callable[[Sequence[Trial]], Trained], kept: Path) -> Trial:
    """The best trial of the grid on validation; its scores are kept in a file and not computed twice."""
    if len(method.trials) == 1:
        return method.trials[0]
    if kept.exists():
        return method.trials[int(json.loads(kept.read_text())["chosen"])]
    candidates = run(method.trials).candidates
    chosen = max(range(len(candidates)), key=lambda index: candidates[index].rank)
    points = [
        {
            **trial.model_dump(mode="json", serialize_as_any=True),
            "score": c.score,
            "loss": c.loss,
            "epoch": c.best_epoch,
        }
        for trial, c in zip(method.trials, candidates, strict=True)
    ]
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps({"method": method.name, "chosen": chosen, "points": points}, indent=1))
    return method.trials[chosen]
