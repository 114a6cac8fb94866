"""The training loop: many candidates of one method in one pass over the features.

The learning rate warms up and then follows a cosine; the epoch that is best on validation is kept. Every draw comes
from the seed, and the state of a run is kept as it goes, so that an interrupted run ends as any other. A batch goes
through the model in parts that fit the memory, whose gradients add up to those of the whole.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from adapt.training.batch_order import WINDOW, epoch_batches
from adapt.training.candidate import Candidate, all_finite
from adapt.training.checkpoint import Checkpoint, Done, Member
from adapt.training.distributed import world
from adapt.training.metrics import Metrics, average_views, evaluate
from adapt.training.objective import Objective
from adapt.training.optimizer import Optimizer, make_optimizer, make_schedule
from extract.forward.device import autocast, synchronize, to_device
from store.console.progress import progress
from store.layout import in_groups

Rows = Int[np.ndarray, "_"]


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of a feature source."""

    device: torch.device

    @property
    def views(self) -> int:
        """Consecutive rows that show the same sample."""
        ...

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Labels by row."""
        ...

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """How many samples a forward and backward pass may hold."""
        ...

    def for_epoch(self, seed: int, epoch: int) -> "Batches":
        """What an epoch of training sees: images may be augmented."""
        ...

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, Any]]:
        """(rows, inputs of a model) for every group of rows; so many groups may be read together."""
        ...


@dataclass(frozen=True)
class Settings:
    """What all candidates of a pass share."""

    epochs: int
    batch_size: int
    seed: int
    optimizer: Optimizer = "adamw"
    warmup: float = 0.1  # share of all steps
    balance_classes: bool = False
    precision: str = "float32"  # of autocast
    head_lr: float | None = None  # None: that of the candidate
    grad_accumulation: int | None = None  # parts that a batch goes through the model in; None: as memory demands
    grad_checkpointing: bool = False
    mixup: float = 0.0  # alpha of its Beta distribution; 0 for none
    shuffle_block: int = 1  # rows that are read together; see `adapt.training.batch_order`


def fit(
    candidates: Sequence[Candidate],
    features: Batches,
    rows: Rows,
    val_rows: Rows,
    settings: Settings,
    objective: Objective,
    checkpoint: Path | None = None,
    describe: str = "training",
) -> float:
    """Train all candidates on the same batches, and leave each with the weights of its best epoch.

    A candidate that diverges keeps its best epoch; one that never had any keeps a score of minus infinity, and where
    that is so of all, training ends early. Returns the seconds that an epoch of training took, validation and saving
    left out.

    Args:
        candidates: models of one method, all reading the same layers.
        rows, val_rows: rows of the training split to train on and to choose the epoch by.
        checkpoint: a file that keeps the state as training goes; a run that finds one goes on from there.
    """
    loop = Loop(candidates, features, settings, objective, len(rows))
    kept = Checkpoint(checkpoint, loop.members, features.device)
    done = kept.load()
    with (
        progress(describe, settings.epochs * len(rows), "samples") as advance,
        torch.random.fork_rng(_devices(features)),
    ):
        torch.manual_seed(settings.seed)
        kept.restore_rng()
        advance(done.epochs * len(rows) + done.steps * settings.batch_size)
        while done.epochs < settings.epochs and (done.epochs == 0 or any(one.best for one in candidates)):
            batches = epoch_batches(rows, settings.batch_size, settings.seed, done.epochs, settings.shuffle_block)
            lap = time.perf_counter()
            for n_rows in loop.train(done.epochs, batches[done.steps :], done.steps):
                advance(n_rows)
                done = replace(done, steps=done.steps + 1, seconds=done.seconds + time.perf_counter() - lap)
                kept.save(done)
                lap = time.perf_counter()
            synchronize(features.device)  # its last steps are the epoch's
            seconds = done.seconds + time.perf_counter() - lap
            loop.validate(val_rows, done.epochs)
            done = Done(done.epochs + 1, 0, seconds)
            kept.save(done)
    for candidate in candidates:
        candidate.load(candidate.best)
    return done.seconds / done.epochs


@torch.no_grad()
def predict_logits(
    models: Sequence[nn.Module], features: Batches, split: str, rows: Rows, precision: str = "float32"
) -> list[Float[Tensor, "rows classes"]]:
    """Logits of several models of one method in one pass, on the CPU."""
    logits: list[list[Tensor]] = [[] for _ in models]
    for model in models:
        model.eval()
    layers = _layers(models)
    for _, inputs in features.batches(split, in_groups(rows, features.samples_at_once(layers)), layers):
        for model, parts in zip(models, logits, strict=True):
            with autocast(features.device, precision):
                parts.append(model(inputs).float().to("cpu", non_blocking=True))
    synchronize(features.device)  # until then logits are on their way
    return [torch.cat(parts) for parts in logits]


def evaluate_split(model: nn.Module, features: Batches, split: str, precision: str = "float32") -> Metrics:
    """Metrics on a whole split; the views of a sample count as one, by their mean logits."""
    labels = features.labels(split)
    logits = predict_logits([model], features, split, np.arange(len(labels)), precision)[0]
    return evaluate(average_views(logits, features.views), labels[:: features.views])


class Loop:
    """The steps of one pass, and what takes them."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        features: Batches,
        settings: Settings,
        objective: Objective,
        n_rows: int,
    ) -> None:
        self._candidates, self._features, self._settings = candidates, features, settings
        self._objective, self._labels = objective.to(features.device), features.labels("train")
        self._layers = _layers([candidate.model for candidate in candidates])
        parts = settings.grad_accumulation or math.ceil(settings.batch_size / features.samples_at_once(self._layers))
        at_once = math.ceil(settings.batch_size / parts)  # parts of equal size: a small last one takes longer a sample
        self._world = world()
        self._at_once = min(at_once, math.ceil(settings.batch_size / self._world.size))
        for candidate in candidates:
            candidate.model.to(features.device)
            if settings.grad_checkpointing:
                candidate.model.checkpoint_blocks()  # type: ignore[operator]
        steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
        factor = make_schedule(steps, settings.warmup)
        self.members = [_member(candidate, settings, factor) for candidate in candidates]

    def train(self, epoch: int, batches: Sequence[Rows], first: int = 0) -> Iterator[int]:
        """A step a candidate for every batch of an epoch, or of what is left from step `first` on; the rows of each."""
        for candidate in self._candidates:
            candidate.model.train()
        parts = [self._world.shard(in_groups(rows, self._at_once)) for rows in batches]
        features = self._features.for_epoch(self._settings.seed, epoch)
        together = WINDOW * max(map(len, parts), default=1) if self._settings.shuffle_block > 1 else 1
        inputs = features.batches("train", [part for batch in parts for part in batch], self._layers, together)
        for number, (rows, batch) in enumerate(zip(batches, parts, strict=True), start=first):
            if self._world.size > 1:  # else what the checkpoint keeps of the generators is enough
                torch.manual_seed(_step_seed(self._settings.seed, epoch, number, self._world.rank))
            labels = self._labels_of(rows)
            for part, values in islice(inputs, len(batch)):
                self._add_gradients(values, self._labels_of(part), labels)
            for candidate, optimizer, scheduler in self.members:
                self._world.all_reduce_gradients(p for p in candidate.model.parameters() if p.requires_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
            yield len(rows)

    def _add_gradients(self, inputs: Any, labels: Tensor, whole: Tensor) -> None:
        share, order = self._draw_mixup(len(labels))
        if share < 1:
            inputs = share * inputs + (1 - share) * inputs[order]
        for candidate in self._candidates:
            with autocast(self._features.device, self._settings.precision):
                logits = candidate.model(inputs).float()
            loss = share * self._objective(logits, labels, whole)
            if share < 1:
                loss = loss + (1 - share) * self._objective(logits, labels[order], whole)
            loss.backward()  # type: ignore[no-untyped-call]

    def _draw_mixup(self, size: int) -> tuple[float, Tensor]:
        """The share that every image keeps, and the images that fill it up (Zhang et al., arXiv 1710.09412)."""
        if not self._settings.mixup:
            return 1.0, torch.empty(0)
        alpha = torch.tensor(self._settings.mixup)
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        return share, to_device(torch.randperm(size), self._features.device)

    def _labels_of(self, rows: Rows) -> Tensor:
        return to_device(self._labels[torch.from_numpy(rows)], self._features.device)

    def validate(self, rows: Rows, epoch: int) -> None:
        """Keep the weights of every candidate that has become better."""
        models = [candidate.model for candidate in self._candidates]
        labels = self._labels[torch.from_numpy(rows)]
        predicted = predict_logits(models, self._features, "train", rows, self._settings.precision)
        for candidate, logits in zip(self._candidates, predicted, strict=True):
            if all_finite(logits):  # else a rate too high for this candidate: it keeps its best epoch
                candidate.consider(self._objective.judge(logits, labels), epoch + 1)


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Dropout and mixup differ between processes that train together, and are the same again after an interruption."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0])


def _layers(models: Sequence[nn.Module]) -> tuple[int, ...]:
    layers: tuple[int, ...] = models[0].layers  # type: ignore[assignment]
    assert all(model.layers == layers for model in models)
    return layers


def _devices(features: Batches) -> list[torch.device]:
    return [features.device] if features.device.type == "cuda" else []


def _member(candidate: Candidate, settings: Settings, factor: Callable[[int], float]) -> Member:
    assert candidate.lr is not None
    lr, decay = candidate.lr, candidate.weight_decay
    optimizer = make_optimizer(candidate.model, settings.optimizer, lr, decay, settings.head_lr)
    return Member(candidate, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))
