"""Trains many candidates, of any methods and seeds, in one pass over the features.

The learning rate warms up and then follows a cosine; the weights of the epoch that is best on validation are kept, or
those of the last one. All randomness derives from the seed of a candidate, so that it trains alone as it trains among
others; the state of a pass is saved while it trains, so that an interrupted one gives the same result. A batch is split
into parts that fit into memory, whose gradients are accumulated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.methods.trained_parameters import trainable
from adapt.training.batch_order import WINDOW, Rows, epoch_batches
from adapt.training.batches import Batches, as_model_input
from adapt.training.candidate import Candidate, all_finite, union_of_layers
from adapt.training.checkpoint import Checkpoint, TrainingProgress
from adapt.training.distributed import world
from adapt.training.evaluation import predict_logits
from adapt.training.halving import Rung, drop_worst
from adapt.training.optimizer import make_schedule
from adapt.training.seed_part import PartRows, SeedParts
from adapt.training.settings import Settings
from adapt.training.solved_heads import solve_trained_heads
from adapt.training.stacks import CandidateStack, grouped, make_state
from extract.forward.device import Stopwatch
from store.console.progress import progress

NumberedRows = tuple[int, Rows]  # a part of a batch, and its position there


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """Candidates that are trained on the same batches.

    Args:
        candidates: of any methods and seeds.
        inputs: features, or images for a single candidate.
        settings: hyperparameters.
        rungs: of successive halving; none by default.
        on_epoch: is called with every candidate that was trained in an epoch.
        description: label of the progress bar.
    """

    candidates: Sequence[Candidate]
    inputs: Batches
    settings: Settings
    rungs: Sequence[Rung] = ()
    on_epoch: Callable[[Candidate], None] = lambda _: None
    description: str = "training"


def fit(job: TrainingPass, checkpoint: Path | None = None) -> None:
    """Train all candidates on the same batches, and load the weights of the epoch that is kept into each.

    Where the settings say so, the heads are then solved anew. A candidate that diverges keeps an epoch before; one that
    diverges in the first epoch has a score of minus infinity.

    Args:
        job: what is trained.
        checkpoint: file for the state of the pass; if it exists, training resumes from it.
    """
    loop = Loop(job)
    file = Checkpoint(checkpoint, loop.states, job.inputs.device)
    current = file.load()
    total, done = job.settings.epochs * loop.n_rows, current.epochs * loop.n_rows
    done += current.steps * job.settings.batch_size
    with (
        progress(job.description, total, "samples", done=min(done, total)) as advance,
        torch.random.fork_rng(_cuda_devices(job.inputs)),
    ):
        while current.epochs < job.settings.epochs and any(candidate.active for candidate in job.candidates):
            for n_rows in loop.train(current.epochs, current.steps):
                advance(n_rows)
                current = replace(current, steps=current.steps + 1)
                if file.is_due:
                    loop.settle()
                    file.save(current)
            loop.end_epoch(current.epochs)
            advance(0, note=_describe_epoch(job.candidates))
            current = TrainingProgress(epochs=current.epochs + 1, steps=0)
            if file.is_due:
                file.save(current)
    for candidate in job.candidates:
        candidate.load(candidate.best)
    if job.settings.solve_head is not None:
        solve_trained_heads(job.candidates, job.inputs, job.settings.solve_head, precision=job.settings.precision)


class Loop:
    """Training steps and validation of the candidates of one pass.

    Attributes:
        states: every candidate with its optimizer and scheduler.
        n_rows: rows that an epoch reads.
    """

    def __init__(self, job: TrainingPass) -> None:
        self._job, self._settings, inputs = job, job.settings, job.inputs
        self._device, self._world = inputs.device, world()
        self._labels, self._layers = inputs.labels("train"), union_of_layers(job.candidates)
        by_seed = {candidate.data.seed: candidate.data for candidate in job.candidates}
        self._seeds = {seed: SeedParts(data, self._labels, self._device) for seed, data in by_seed.items()}
        self._needed = np.logical_or.reduce([seed.mask for seed in self._seeds.values()])
        self.n_rows = int(self._needed.sum())
        # draws are stratified alike, so that all seeds have as many rows
        n_trained = max(len(data.rows) for data in by_seed.values())
        self._n_batches = math.ceil(n_trained / self._settings.batch_size)
        for candidate in job.candidates:
            candidate.model.to(self._device)
            if self._settings.grad_checkpointing:
                candidate.model.checkpoint_blocks()  # type: ignore[operator]
        schedule = make_schedule(self._settings.epochs * self._n_batches, self._settings.warmup)
        self.states = [make_state(candidate, self._settings, schedule) for candidate in job.candidates]
        self._reading, self._stacks = Stopwatch(self._device), list[CandidateStack]()

    def train(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Take the steps of an epoch, and yield the number of rows that each has read.

        Args:
            epoch: number of the epoch.
            first: number of the first step; not 0 where an interrupted epoch resumes.
        """
        self._stacks = self._make_stacks()
        order = epoch_batches(len(self._labels), self._n_batches, epoch, self._settings.shuffle_block)[first:]
        # start reading this process's parts of all batches
        batches = [self._world.shard(self._parts_of(rows)) for rows in order]
        read = self._read(epoch, batches)
        for step, (rows, parts) in enumerate(zip(order, batches, strict=True), start=first):
            # accumulate the gradients of the parts, then step every candidate
            for number, part in parts:
                self._add_gradients(PartRows(rows, part, epoch=epoch, step=step, number=number), next(read))
            for stack in self._stacks:
                stack.step(self._world, has_rows=bool(self._seeds[stack.seed].mask[rows].any()))
            yield int(self._needed[rows].sum())

    def settle(self) -> None:
        """Add the seconds and the losses since the last call to every candidate."""
        seconds = self._reading.take()
        for stack in self._stacks:
            stack.settle(seconds)

    def end_epoch(self, epoch: int) -> None:
        """Validate every candidate, keep its weights if they are its best so far, and drop those that are out."""
        self.settle()
        for stack in self._stacks:
            stack.set_train_loss()
        active = [candidate for candidate in self._job.candidates if candidate.active]
        self._validate(active, epoch + 1)
        for rung in self._job.rungs:
            if rung.epoch == epoch + 1:
                drop_worst(self._job.candidates, rung.share)
        for candidate in active:
            candidate.history.append((candidate.train_loss, candidate.val_score, candidate.val_loss))
            self._job.on_epoch(candidate)

    def _validate(self, active: Sequence[Candidate], epoch: int) -> None:
        rows = [candidate.data.val_rows for candidate in active]
        predicted = predict_logits(active, self._job.inputs, "train", rows, precision=self._settings.precision)
        for candidate, logits in zip(active, predicted, strict=True):
            candidate.epochs = epoch
            data = candidate.data
            if not all_finite(logits) or not all(map(all_finite, trainable(candidate.model).values())):
                candidate.active = False  # it has diverged
            elif len(logits):
                rank = data.objective.judge(logits, self._labels[torch.from_numpy(data.val_rows)])
                candidate.consider(rank, epoch, keep=self._settings.keep)
            else:  # trained on all rows: the last epoch counts
                candidate.keep((math.nan, math.nan), epoch)

    def _make_stacks(self) -> list[CandidateStack]:
        active = [state for state in self.states if state.candidate.active]
        for state in active:
            state.candidate.model.train()
        groups = grouped([state.candidate for state in active])
        return [CandidateStack([active[k] for k in group], self._settings, self._device) for group in groups]

    def _parts_of(self, rows: Rows) -> list[NumberedRows]:
        """Split a batch into parts of equal size, and leave out the rows that no seed trains on.

        The split does not depend on the other candidates of the pass, so that neither does dropout.
        """
        at_once = self._job.inputs.part_size(self._layers)
        n_parts = self._settings.grad_accumulation or math.ceil(len(rows) / at_once)
        split = np.array_split(rows, max(n_parts, self._world.size))
        needed = [(number, part[self._needed[part]]) for number, part in enumerate(split)]
        return [(number, part) for number, part in needed if len(part)]

    def _read(self, epoch: int, batches: Sequence[Sequence[NumberedRows]]) -> Iterator[Any]:
        """The inputs of all parts of some batches."""
        inputs = self._job.inputs.for_epoch(self._job.candidates[0].data.seed, epoch)
        together = WINDOW * max(map(len, batches), default=1) if self._settings.shuffle_block > 1 else 1
        rows = [part for parts in batches for _, part in parts]
        parts = inputs.batches("train", rows, self._layers, together)
        for _ in rows:
            with self._reading:
                _, values = next(parts)
            yield as_model_input(values)

    def _add_gradients(self, of: PartRows, values: Any) -> None:
        """Backward of a part of a batch, for every candidate."""
        settings = self._settings
        for seed, parts in self._seeds.items():
            stacks = [stack for stack in self._stacks if stack.seed == seed]
            own_part = parts.part(of, values, settings) if stacks else None
            for stack in stacks:
                if own_part:
                    stack.add_gradients(own_part)


def _describe_epoch(candidates: Sequence[Candidate]) -> str:
    """The lowest loss of the last epoch and the best validation score, such as `loss 0.412, validation 87.20`."""
    active = [candidate for candidate in candidates if candidate.active]
    losses = [candidate.train_loss for candidate in active if math.isfinite(candidate.train_loss)]
    scores = [candidate.val_score for candidate in active if math.isfinite(candidate.val_score)]
    texts = [f"loss {min(losses):.3f}" if losses else "", f"validation {max(scores):.2f}" if scores else ""]
    return ", ".join(filter(None, texts))


def _cuda_devices(inputs: Batches) -> list[torch.device]:
    return [inputs.device] if inputs.device.type == "cuda" else []
