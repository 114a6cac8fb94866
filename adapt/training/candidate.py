"""Holds a model in training together with its hyperparameters and its best state on validation so far."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from adapt.methods.trained_parameters import trainable
from adapt.training.seed_rows import SeedRows
from store.errors import JobError

StateDict = dict[str, Tensor]


@dataclass
class Candidate:
    """A model with its hyperparameters, the rows of its seed, and its best epoch.

    Args:
        model: the model.
        lr: learning rate; None if the model is solved, not trained in steps.
        weight_decay: weight decay.
        data: the rows that it is trained and validated on.
        method: name of its method.
        contest: candidates of the same contest are compared when successive halving drops the worst.

    Attributes:
        active: whether it is trained further; false once it has diverged or was dropped.
        was_dropped: whether successive halving dropped it.
        epochs: how many epochs it was trained for.
        seconds: training seconds of these epochs: reading of all batches, and its share of the steps of its stack.
        reading_seconds: those of them that reading took.
        train_loss: mean loss of the steps of the last epoch.
        loss_sum: sum of the losses of the steps of the current epoch.
        n_steps: number of these steps.
        val_score: validation score after the last epoch; nan without validation rows.
        val_loss: validation loss after the last epoch.
        last_lr: learning rate of the last step.
        history: train loss, validation score and validation loss after each epoch.
    """

    model: nn.Module
    lr: float | None
    weight_decay: float
    data: SeedRows
    method: str
    contest: str = ""
    best: StateDict = field(default_factory=dict)
    best_epoch: int = 0
    score: float = -math.inf
    loss: float = math.inf
    active: bool = True
    was_dropped: bool = False
    epochs: int = 0
    seconds: float = 0.0
    reading_seconds: float = 0.0
    train_loss: float = math.nan
    loss_sum: float = 0.0
    n_steps: int = 0
    val_score: float = math.nan
    val_loss: float = math.nan
    last_lr: float | None = None
    history: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that the model reads, ascending."""
        layers: tuple[int, ...] = self.model.layers  # type: ignore[assignment]
        return layers

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the score, then minus the loss where scores are equal."""
        return self.score, -self.loss

    @property
    def diverged(self) -> bool:
        """Whether its logits were not finite after its first epoch."""
        return self.score == -math.inf

    def consider(self, rank: tuple[float, float], epoch: int, keep: Literal["best", "last"] = "best") -> None:
        """Keep the current weights if they rank higher than those that are kept, or if the last ones are to be."""
        self.val_score, self.val_loss = rank[0], -rank[1]
        if keep == "last" or rank > self.rank:
            self.keep(rank, epoch)

    def keep(self, rank: tuple[float, float], epoch: int) -> None:
        """Keep the current weights."""
        self.score, self.loss, self.best_epoch = rank[0], -rank[1], epoch
        self.best = self.trained_state()

    def trained_state(self) -> StateDict:
        """A copy of the trainable parameters."""
        return {name: tensor.detach().clone() for name, tensor in trainable(self.model).items()}

    def load(self, state: StateDict) -> None:
        """Load trainable parameters, as `trained_state` returns them."""
        self.model.load_state_dict(state, strict=False)


def union_of_layers(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """The layers that any of the candidates reads, ascending."""
    return tuple(sorted({layer for candidate in candidates for layer in candidate.layers}))


def diverged(rates: Iterable[float | None]) -> JobError:
    """The error for a method of which no trial had finite logits after its first epoch, at these learning rates."""
    text = ", ".join(f"{rate:g}" for rate in sorted({rate for rate in rates if rate}))
    return JobError(f"training diverged in its first epoch at learning rates {text}; lower train.lr")


@torch.no_grad()
def all_finite(logits: Tensor) -> bool:
    """Whether all values are finite; with a learning rate that is too high they are not."""
    return bool(torch.isfinite(logits).all())
