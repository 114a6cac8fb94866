"""Choosing lr, weight decay and options on validation data, every point of a grid in one pass over the features."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from adapt.candidate import Candidate
from adapt.config import MethodConfig, Trial
from adapt.features import Features, PooledFeatures
from adapt.methods import build_model, find_method
from adapt.objective import Objective, make_objective
from adapt.results import write_atomically
from adapt.solve import Pooled, readout_of, solve_heads
from adapt.split import Rows, draw_validation
from adapt.train import Settings, fit


@dataclass(frozen=True)
class Trained:
    """Candidates after a pass, in the order of their trials, and what the pass cost."""

    candidates: list[Candidate]
    seconds_per_epoch: float  # of a solved method: an iteration
    samples_per_second: float


def train_trials(
    method: MethodConfig,
    trials: Sequence[Trial],
    pooled: PooledFeatures,
    settings: Settings,
    val_fraction: float,
    checkpoint: Path | None = None,
) -> Trained:
    """Train trials of one method from one seed, all on the same rows.

    Args:
        pooled: pooled features, with the features they were made from.
        checkpoint: where an interrupted pass keeps its state.
    """
    features = pooled.features
    labels = features.labels("train")
    rows, val_rows = draw_validation(labels, val_fraction, settings.seed)
    objective = make_objective(
        labels[torch.from_numpy(rows)], features.num_classes, features.multi_label, settings.balance_classes
    )
    candidates = [
        Candidate(seeded_model(method.name, features, trial, settings.seed), trial.lr, trial.weight_decay)
        for trial in trials
    ]
    what = f"{method.name} seed {settings.seed}" + (f" ({len(trials)} trials)" if len(trials) > 1 else "")
    seconds: list[float] = []
    for number, (layers, group) in enumerate(_by_layers(candidates).items()):
        _standardise(group, pooled, layers[-1], rows)
        if find_method(method.name).solved:
            seconds.append(_solve(group, pooled, layers[-1], rows, val_rows, objective, what))
        else:
            file = checkpoint.with_suffix(f".{number}.pt") if checkpoint else None
            seconds.append(fit(group, features, rows, val_rows, settings, objective, file, what))
    return Trained(candidates, mean(seconds), len(rows) / mean(seconds))


def _by_layers(candidates: Sequence[Candidate]) -> dict[tuple[int, ...], list[Candidate]]:
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.model.layers, []).append(candidate)  # type: ignore[arg-type]
    return groups


def _standardise(candidates: Sequence[Candidate], pooled: PooledFeatures, layer: int, rows: Rows) -> None:
    readouts = [readout_of(candidate).to(pooled.features.device) for candidate in candidates]
    pooled.require("train", layer, readouts)
    for readout in readouts:
        readout.standardise(pooled.whole("train", layer, readout)[torch.from_numpy(rows)])


def _solve(
    candidates: Sequence[Candidate],
    pooled: PooledFeatures,
    layer: int,
    rows: Rows,
    val_rows: Rows,
    objective: Objective,
    describe: str,
) -> float:
    """Seconds an iteration."""
    labels, seconds = pooled.features.labels("train").to(pooled.features.device), []
    index, val_index = torch.from_numpy(rows), torch.from_numpy(val_rows)
    by_pooling: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_pooling.setdefault(readout_of(candidate).mode, []).append(candidate)
    for mode, group in by_pooling.items():
        values = pooled.whole("train", layer, readout_of(group[0]))
        data = Pooled(values[index], labels[index], values[val_index], labels[val_index])
        seconds.append(solve_heads(group, data, objective, f"{describe}, {mode}"))
    return mean(seconds)


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
