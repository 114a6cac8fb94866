"""Computes candidates on a part of a batch: those of one seed and equal shape together, the others one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adapt.methods.registry import find_method
from adapt.methods.stack import Stack, stack_key
from adapt.methods.trained_parameters import trainable
from adapt.training.candidate import Candidate
from adapt.training.distributed import World
from adapt.training.optimizer import make_optimizer
from adapt.training.seed_part import SeedPart
from adapt.training.settings import Settings
from extract.forward.device import Stopwatch, autocast
from store.layout import in_groups

_MOST_TOGETHER = 32  # more models at once would take memory and save no time


class TrainState(NamedTuple):
    """A candidate with its optimizer and scheduler."""

    candidate: Candidate
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


class CandidateStack:
    """Candidates of one seed that are computed together, or a single one.

    Args:
        states: the candidates, of equal shape, with their optimizers.
        settings: hyperparameters.
        device: where they are computed.
    """

    def __init__(self, states: Sequence[TrainState], settings: Settings, device: torch.device) -> None:
        self._states, self._precision, self._device = states, settings.precision, device
        self.candidates = [state.candidate for state in states]
        self._forward = stacked_forward(self.candidates)
        self._stopwatch, self._losses, self._n_steps = Stopwatch(device), torch.zeros(len(states), device=device), 0

    @property
    def seed(self) -> int:
        """The seed of the candidates."""
        return self.candidates[0].data.seed

    def add_gradients(self, part: SeedPart) -> None:
        """Backward of a part of a batch."""
        with self._stopwatch:
            if self._forward is None:
                losses = [self._backward_alone(candidate, part) for candidate in self.candidates]
            else:
                generator = torch.Generator(self._device).manual_seed(part.random_seed)
                with autocast(self._device, self._precision):
                    stacked = self._forward(part.inputs, [generator] * len(self.candidates)).float()
                losses = [part.loss(logits) for logits in stacked]
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            self._losses += torch.stack([loss.detach() for loss in losses])

    def _backward_alone(self, candidate: Candidate, part: SeedPart) -> Float[Tensor, ""]:
        torch.manual_seed(part.random_seed)
        with autocast(self._device, self._precision):
            logits = candidate.model(part.inputs).float()
        loss = part.loss(logits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step(self, world: World, has_rows: bool) -> None:
        """Sum the gradients of all processes, update every candidate, and advance its learning rate.

        Args:
            world: the processes.
            has_rows: whether the seed trains on any row of the batch; if not, no candidate is changed.
        """
        self._n_steps += has_rows
        with self._stopwatch:
            for candidate, optimizer, scheduler in self._states:
                if has_rows:
                    candidate.last_lr = float(scheduler.get_last_lr()[0])
                    world.all_reduce_gradients(trainable(candidate.model).values())
                optimizer.step()  # tensors without a gradient are left as they are
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()

    def settle(self, shared_seconds: float) -> None:
        """Add the seconds and the losses since the last call to every candidate.

        Args:
            shared_seconds: that reading took, for all stacks.
        """
        seconds = shared_seconds + self._stopwatch.take() / len(self.candidates)
        for candidate, loss in zip(self.candidates, self._losses.tolist(), strict=True):
            candidate.seconds += seconds
            candidate.reading_seconds += shared_seconds
            candidate.loss_sum += loss
            candidate.n_steps += self._n_steps
        self._losses.zero_()
        self._n_steps = 0

    def set_train_loss(self) -> None:
        """Set the mean loss of the steps of the epoch, all of which were settled."""
        for candidate in self.candidates:
            candidate.train_loss = candidate.loss_sum / max(1, candidate.n_steps)
            candidate.loss_sum, candidate.n_steps = 0.0, 0


def stacked_forward(candidates: Sequence[Candidate]) -> Stack | None:
    """The forward pass of all candidates together; None for methods whose models are computed one by one."""
    stack = find_method(candidates[0].method).stack
    return stack([candidate.model for candidate in candidates]) if stack else None


def grouped(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Positions of the candidates that are computed together: of one method, seed and shape, and not too many."""
    groups: dict[Any, list[int]] = {}
    for position, candidate in enumerate(candidates):
        can_stack = find_method(candidate.method).stack is not None
        key = stack_key(candidate.model) if can_stack else position
        groups.setdefault((candidate.method, candidate.data.seed, key), []).append(position)
    return [part for group in groups.values() for part in in_groups(group, _MOST_TOGETHER)]


def make_state(candidate: Candidate, settings: Settings, schedule: Callable[[int], float]) -> TrainState:
    """A candidate with its optimizer, and a scheduler that follows the schedule."""
    assert candidate.lr is not None
    optimizer = make_optimizer(
        candidate.model,
        settings.optimizer,
        lr=candidate.lr,
        weight_decay=candidate.weight_decay,
        head_lr=settings.head_lr,
    )
    return TrainState(candidate, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))


@torch.no_grad()
def predict_group(
    candidates: Sequence[Candidate], inputs: Any, device: torch.device, precision: str
) -> Iterator[Float[Tensor, "rows classes"]]:
    """Logits of candidates that are computed together."""
    forward = stacked_forward(candidates)
    with autocast(device, precision):
        if forward is not None:
            yield from forward(inputs, [torch.default_generator] * len(candidates)).float()
            return
        for candidate in candidates:
            yield candidate.model(inputs).float()
