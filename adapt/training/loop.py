"""Trains many candidates of one method in one pass over the features.

The learning rate warms up and then follows a cosine; the weights of the epoch that is best on validation are kept. All
randomness derives from the seed, and the state of a run is saved while it trains, so that an interrupted run gives the
same result. A batch is split into parts that fit into memory, whose gradients are accumulated.
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
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from adapt.training.batch_order import WINDOW, Rows, epoch_batches
from adapt.training.candidate import Candidate, all_finite
from adapt.training.checkpoint import Checkpoint, TrainingProgress, TrainState
from adapt.training.distributed import world
from adapt.training.metrics import Metrics, average_views, evaluate
from adapt.training.objective import Objective
from adapt.training.optimizer import Optimizer, make_optimizer, make_schedule
from extract.forward.device import autocast, synchronize, to_device
from store.console.progress import progress
from store.layout import in_groups


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of features, or of images."""

    device: torch.device

    @property
    def views(self) -> int:
        """Consecutive rows that show the same sample."""
        ...

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Labels by row."""
        ...

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """How many samples fit into memory in one forward and backward pass."""
        ...

    def for_epoch(self, seed: int, epoch: int) -> "Batches":
        """The inputs of one epoch: images may be augmented."""
        ...

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, Any]]:
        """(rows, inputs of a model) for every group of rows; `together` groups may be read at once."""
        ...


@dataclass(frozen=True)
class Settings:
    """Hyperparameters that all candidates of a pass share."""

    epochs: int
    batch_size: int
    seed: int
    optimizer: Optimizer = "adamw"
    warmup: float = 0.1  # fraction of all steps
    balance_classes: bool = False
    precision: str = "float32"  # of autocast
    head_lr: float | None = None  # None: that of the candidate
    grad_accumulation: int | None = None  # parts of a batch; None: as few as fit into memory
    grad_checkpointing: bool = False
    mixup: float = 0.0  # alpha of the Beta distribution; 0 for none
    shuffle_block: int = 1  # neighboring rows that are read at once; see `adapt.training.batch_order`


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """Inputs, rows and loss that all candidates of a pass share.

    Args:
        features: inputs and labels.
        rows: rows of the training split that are trained on.
        val_rows: rows of the training split that the best epoch is chosen by.
        objective: the loss.
    """

    features: Batches
    rows: Rows
    val_rows: Rows
    objective: Objective


def fit(
    candidates: Sequence[Candidate],
    task: TrainingTask,
    settings: Settings,
    checkpoint: Path | None = None,
    description: str = "training",
) -> float:
    """Train all candidates on the same batches, and load the weights of its best epoch into each.

    A candidate that diverges keeps its best epoch; one that diverges in the first epoch has a score of minus infinity.
    Training ends early if all do.

    Args:
        candidates: models of one method, which all read the same layers.
        task: what they are trained on.
        settings: hyperparameters.
        checkpoint: file for the state of the run; if it exists, training resumes from it.
        description: label of the progress bar.

    Returns:
        training seconds of an epoch, without validation and saving.
    """
    loop = Loop(candidates, task, settings)
    file = Checkpoint(checkpoint, loop.states, task.features.device)
    current, n_rows = file.load(), len(task.rows)
    with (
        progress(description, settings.epochs * n_rows, "samples") as advance,
        torch.random.fork_rng(_cuda_devices(task.features)),
    ):
        torch.manual_seed(settings.seed)
        file.restore_rng()
        advance(current.epochs * n_rows + current.steps * settings.batch_size)
        while current.epochs < settings.epochs and (current.epochs == 0 or any(one.best for one in candidates)):
            current = _train_epoch(loop, file, current, advance)
            loop.validate(task.val_rows, current.epochs)
            current = TrainingProgress(epochs=current.epochs + 1, steps=0, seconds=current.seconds)
            file.save(current)
    for candidate in candidates:
        candidate.load(candidate.best)
    return current.seconds / current.epochs


def _train_epoch(
    loop: "Loop", checkpoint: Checkpoint, current: TrainingProgress, advance: Callable[[int], None]
) -> TrainingProgress:
    """Take the remaining steps of an epoch, and save the state after each."""
    batches = loop.epoch_batches(current.epochs)[current.steps :]
    lap = time.perf_counter()
    for n_rows in loop.train(current.epochs, batches, current.steps):
        advance(n_rows)
        seconds = current.seconds + time.perf_counter() - lap
        current = replace(current, steps=current.steps + 1, seconds=seconds)
        checkpoint.save(current)
        lap = time.perf_counter()
    synchronize(loop.device)  # queued steps belong to this epoch
    return replace(current, seconds=current.seconds + time.perf_counter() - lap)


@torch.no_grad()
def predict_logits(
    models: Sequence[nn.Module], features: Batches, split: str, rows: Rows, precision: str = "float32"
) -> list[Float[Tensor, "rows classes"]]:
    """Logits of several models of one method in one pass over the rows, on the CPU."""
    logits: list[list[Tensor]] = [[] for _ in models]
    for model in models:
        model.eval()
    layers = _layers(models)
    for _, inputs in features.batches(split, in_groups(rows, features.samples_at_once(layers)), layers):
        for model, parts in zip(models, logits, strict=True):
            with autocast(features.device, precision):
                parts.append(model(inputs).float().to("cpu", non_blocking=True))
    synchronize(features.device)  # the copies are asynchronous
    return [torch.cat(parts) for parts in logits]


def evaluate_split(model: nn.Module, features: Batches, split: str, precision: str = "float32") -> Metrics:
    """Metrics on a whole split; the logits of the views of a sample are averaged."""
    labels = features.labels(split)
    (logits,) = predict_logits([model], features, split, np.arange(len(labels)), precision=precision)
    return evaluate(average_views(logits, features.views), labels[:: features.views])


class Loop:
    """Training steps and validation of the candidates of one pass.

    Attributes:
        states: every candidate with its optimizer and scheduler.
        device: where they are trained.
    """

    def __init__(self, candidates: Sequence[Candidate], task: TrainingTask, settings: Settings) -> None:
        features = task.features
        self._candidates, self._task, self._settings = candidates, task, settings
        self.device, self._world = features.device, world()
        self._objective, self._labels = task.objective.to(self.device), features.labels("train")
        self._layers = _layers([candidate.model for candidate in candidates])
        # split a batch into parts of equal size: a small last one would take longer a sample
        parts = settings.grad_accumulation or math.ceil(settings.batch_size / features.samples_at_once(self._layers))
        part_size = math.ceil(settings.batch_size / parts)
        self._part_size = min(part_size, math.ceil(settings.batch_size / self._world.size))
        for candidate in candidates:
            candidate.model.to(self.device)
            if settings.grad_checkpointing:
                candidate.model.checkpoint_blocks()  # type: ignore[operator]
        steps = settings.epochs * math.ceil(len(task.rows) / settings.batch_size)
        schedule = make_schedule(steps, settings.warmup)
        self.states = [_train_state(candidate, settings, schedule) for candidate in candidates]

    def epoch_batches(self, epoch: int) -> list[Rows]:
        """Rows of every batch of an epoch."""
        size, seed, block = self._settings.batch_size, self._settings.seed, self._settings.shuffle_block
        return epoch_batches(self._task.rows, size, seed, epoch=epoch, block=block)

    def train(self, epoch: int, batches: Sequence[Rows], first: int = 0) -> Iterator[int]:
        """Take one step for every batch, and yield its number of rows.

        Args:
            epoch: number of the epoch.
            batches: batches of the epoch, from number `first` on.
            first: number of the first batch; not 0 where an interrupted epoch resumes.
        """
        for candidate in self._candidates:
            candidate.model.train()
        # start reading this process's parts of all batches
        parts = [self._world.shard(in_groups(rows, self._part_size)) for rows in batches]
        features = self._task.features.for_epoch(self._settings.seed, epoch)
        together = WINDOW * max(map(len, parts), default=1) if self._settings.shuffle_block > 1 else 1
        inputs = features.batches("train", [part for batch in parts for part in batch], self._layers, together)
        for number, (rows, batch) in enumerate(zip(batches, parts, strict=True), start=first):
            if self._world.size > 1:  # one process alone resumes from the generators in its checkpoint
                torch.manual_seed(_step_seed(self._settings.seed, epoch, number, self._world.rank))
            # accumulate the gradients of the parts, then step every candidate
            labels = self._labels_of(rows)
            for part, values in islice(inputs, len(batch)):
                self._add_gradients(values, self._labels_of(part), labels)
            for candidate, optimizer, scheduler in self.states:
                self._world.all_reduce_gradients(p for p in candidate.model.parameters() if p.requires_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
            yield len(rows)

    def _add_gradients(self, inputs: Any, labels: Tensor, batch_labels: Tensor) -> None:
        """Backward of a part of a batch, for every candidate."""
        share, order = self._draw_mixup(len(labels))
        if share < 1:
            inputs = share * inputs + (1 - share) * inputs[order]
        for candidate in self._candidates:
            with autocast(self.device, self._settings.precision):
                logits = candidate.model(inputs).float()
            loss = share * self._objective(logits, labels, batch_labels)
            if share < 1:
                loss = loss + (1 - share) * self._objective(logits, labels[order], batch_labels)
            loss.backward()  # type: ignore[no-untyped-call]

    def _draw_mixup(self, size: int) -> tuple[float, Tensor]:
        """The weight lambda of every image, and the images that are mixed in (Zhang et al., arXiv 1710.09412)."""
        if not self._settings.mixup:
            return 1.0, torch.empty(0)
        alpha = torch.tensor(self._settings.mixup)
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        return share, to_device(torch.randperm(size), self.device)

    def _labels_of(self, rows: Rows) -> Tensor:
        return to_device(self._labels[torch.from_numpy(rows)], self.device)

    def validate(self, rows: Rows, epoch: int) -> None:
        """Evaluate every candidate, and keep its weights if they are its best so far."""
        models = [candidate.model for candidate in self._candidates]
        labels = self._labels[torch.from_numpy(rows)]
        predicted = predict_logits(models, self._task.features, "train", rows, precision=self._settings.precision)
        for candidate, logits in zip(self._candidates, predicted, strict=True):
            if all_finite(logits):  # else it has diverged
                candidate.consider(self._objective.judge(logits, labels), epoch + 1)


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed for dropout and mixup: another for every process, and the same when a run resumes."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0])


def _layers(models: Sequence[nn.Module]) -> tuple[int, ...]:
    """The layers that all of the models read."""
    layers: tuple[int, ...] = models[0].layers  # type: ignore[assignment]
    assert all(model.layers == layers for model in models)
    return layers


def _cuda_devices(features: Batches) -> list[torch.device]:
    return [features.device] if features.device.type == "cuda" else []


def _train_state(candidate: Candidate, settings: Settings, schedule: Callable[[int], float]) -> TrainState:
    assert candidate.lr is not None
    optimizer = make_optimizer(
        candidate.model,
        settings.optimizer,
        lr=candidate.lr,
        weight_decay=candidate.weight_decay,
        head_lr=settings.head_lr,
    )
    return TrainState(candidate, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
