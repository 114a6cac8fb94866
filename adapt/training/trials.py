"""Trains trials of any methods and seeds together: they share each read of the features."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from adapt.config.trials import Trial
from adapt.features.feature_source import Features
from adapt.features.image_batches import ImageBatches
from adapt.features.pooled import PooledFeatures
from adapt.methods.readout import Readout
from adapt.methods.registry import build_model, find_method
from adapt.training.callbacks import EpochEvent, Phase
from adapt.training.candidate import Candidate
from adapt.training.halving import Rung
from adapt.training.linear_solver import ProbeData, readout_of, solve_heads
from adapt.training.loop import TrainingPass, fit
from adapt.training.neighbors import take_neighbors
from adapt.training.row_draw import RowDraw
from adapt.training.seed_draw import rows_of_seed
from adapt.training.seed_rows import SeedRows
from adapt.training.selected_heads import solve_selected_heads
from adapt.training.settings import Settings

_Key = TypeVar("_Key")
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trial of a method, to be trained from one seed.

    Args:
        method: name of the method.
        trial: its hyperparameters.
        seed: the seed.
        settings: hyperparameters that other entries may share; those with equal ones are trained together.
        contest: name of the search that the entry is part of, if any.
        rungs: of successive halving among the entries of a contest.
    """

    method: str
    trial: Trial
    seed: int
    settings: Settings
    contest: str = ""
    rungs: tuple[Rung, ...] = ()


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

    def new_model(self, name: str, trial: Trial, seed: int) -> nn.Module:
        """Build an untrained model, initialized from the seed."""
        features, backbone = self.pooled.features, self.images.backbone if self.images else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs, and is not undone
            return build_model(name, features.spec, features.num_classes, trial.options, backbone=backbone)


def train_entries(
    entries: Sequence[Entry],
    data: TrainingData,
    row_draw: RowDraw,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Entry, Candidate], None] = lambda entry, candidate: None,
) -> list[Candidate]:
    """Train entries of any methods and seeds, in as few passes over the features as their settings allow.

    Args:
        entries: what is trained; a single one if `data` has images, whose methods need a backbone each.
        data: what they are trained from.
        row_draw: how the rows of each seed are drawn.
        checkpoint: path without suffix for the state of every pass; where one exists, training resumes from it.
        on_epoch: is called with an entry and its candidate after each of its epochs.

    Returns:
        a trained candidate for every entry.
    """
    seeds = _draw_seeds(entries, data.pooled.features, row_draw)
    candidates = [_new_candidate(entry, data, seeds[entry.seed]) for entry in entries]
    _standardize(candidates, data.pooled)
    both = list(zip(entries, candidates, strict=True))
    _solve([candidate for candidate in candidates if find_method(candidate.method).solved], data.pooled)
    in_steps = [pair for pair in both if not find_method(pair[0].method).solved]
    entry_of = {id(candidate): entry for entry, candidate in both}
    passes = _grouped(in_steps, lambda pair: (pair[0].settings, pair[0].rungs))
    for number, pairs in enumerate(passes):
        first = pairs[0][0]
        job = TrainingPass(
            candidates=[candidate for _, candidate in pairs],
            inputs=data.inputs,
            settings=first.settings,
            rungs=first.rungs,
            on_epoch=lambda candidate: on_epoch(entry_of[id(candidate)], candidate),
            description=_describe(entries=[entry for entry, _ in pairs]),
        )
        fit(job, checkpoint.with_suffix(f".{number}.pt") if checkpoint else None)
    return candidates


def epoch_event(entry: Entry, candidate: Candidate, phase: Phase) -> EpochEvent:
    """What callbacks are told of the last epoch of a candidate."""
    return EpochEvent(
        method=entry.method,
        options=entry.trial.options.model_dump(mode="json"),
        lr=entry.trial.lr,
        last_lr=candidate.last_lr,
        weight_decay=entry.trial.weight_decay,
        seed=entry.seed,
        epoch=candidate.epochs,
        train_loss=candidate.train_loss,
        val_score=candidate.val_score,
        val_loss=candidate.val_loss,
        phase=phase,
    )


def _draw_seeds(entries: Sequence[Entry], features: Features, row_draw: RowDraw) -> dict[int, SeedRows]:
    """The rows of every seed."""
    balance_classes = entries[0].settings.balance_classes  # the same for all entries of a job
    seeds = dict.fromkeys(entry.seed for entry in entries)
    return {seed: rows_of_seed(features, row_draw, seed, balance_classes) for seed in seeds}


def _new_candidate(entry: Entry, data: TrainingData, rows: SeedRows) -> Candidate:
    trial = entry.trial
    model = data.new_model(entry.method, trial, entry.seed)
    if data.images and data.images.device.type == "cpu" and entry.settings.precision == "bfloat16":
        model.unfuse_attention()  # type: ignore[operator]
    return Candidate(
        model,
        trial.lr,
        trial.weight_decay,
        data=rows,
        method=entry.method,
        contest=entry.contest,
    )


def _describe(entries: Sequence[Entry]) -> str:
    """The label of a progress bar."""
    methods = list(dict.fromkeys(entry.method for entry in entries))
    seeds = sorted({entry.seed for entry in entries})
    names = ", ".join(methods[:3]) + (" ..." if len(methods) > 3 else "")
    text = f"{names} seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{text} ({len(entries)} trials)" if len(entries) > 1 else text


def _grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> list[list[_Item]]:
    """Items with equal keys, in order of their first."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _standardize(candidates: Sequence[Candidate], pooled: PooledFeatures) -> None:
    """Give every read-out mean and deviation of the training rows, computed once for each seed, layers and pooling."""
    pooled.require("train", [readout_of(candidate) for candidate in candidates])
    first_of: dict[tuple[int, tuple[int, ...], str], Readout] = {}
    for candidate in candidates:
        readout = readout_of(candidate).to(pooled.features.device)
        key = _reads(candidate)
        if key not in first_of:
            values = pooled.whole("train", readout)[torch.from_numpy(candidate.data.rows)]
            readout.standardize(values, pooled.rounding("train", readout))
            first_of[key] = readout
        readout.mean, readout.std = first_of[key].mean, first_of[key].std


def _solve(candidates: Sequence[Candidate], pooled: PooledFeatures) -> None:
    """Solve heads, those of a method with the same rows, layers and pooling together."""
    for group in _grouped(candidates, lambda candidate: (candidate.method, _reads(candidate))):
        method, rows = group[0].method, group[0].data
        description = f"{method} seed {rows.seed}, {readout_of(group[0]).mode}"
        solvers = {"linear_probe": solve_heads, "head2toe": solve_selected_heads, "knn": take_neighbors}
        seconds = solvers[method](group, _probe_data(group[0], pooled), rows.objective, description)
        for candidate in group:
            candidate.seconds, candidate.epochs = seconds, 1


def _reads(candidate: Candidate) -> tuple[int, tuple[int, ...], str]:
    """What the head of a candidate is solved on: equal for equal seed, layers and pooling."""
    readout = readout_of(candidate)
    return candidate.data.seed, readout.layers, readout.mode


def _probe_data(candidate: Candidate, pooled: PooledFeatures) -> ProbeData:
    """Pooled features and labels of the rows of a candidate."""
    values, labels = pooled.whole("train", readout_of(candidate)), pooled.features.labels("train")
    index, val_index = torch.from_numpy(candidate.data.rows), torch.from_numpy(candidate.data.val_rows)
    parts = (values[index], labels[index], values[val_index], labels[val_index])
    return ProbeData(*(part.to(pooled.features.device) for part in parts))
