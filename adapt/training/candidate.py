"""Holds a model in training together with its hyperparameters and its best state on validation so far."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from store.errors import JobError

StateDict = dict[str, Tensor]


@dataclass
class Candidate:
    """A model with its learning rate (None if it is solved, not trained in steps), weight decay and best epoch."""

    model: nn.Module
    lr: float | None
    weight_decay: float
    best: StateDict = field(default_factory=dict)
    best_epoch: int = 0
    score: float = -math.inf
    loss: float = math.inf

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that the model reads, ascending."""
        layers: tuple[int, ...] = self.model.layers  # type: ignore[assignment]
        return layers

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the score, then minus the loss where scores are equal."""
        return self.score, -self.loss

    def consider(self, rank: tuple[float, float], epoch: int) -> None:
        """Make the current weights the best ones if they rank higher."""
        if rank > self.rank:
            self.score, self.loss, self.best_epoch = rank[0], -rank[1], epoch
            self.best = self.trained_state()

    def trained_state(self) -> StateDict:
        """A copy of the trainable parameters."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def load(self, state: StateDict) -> None:
        """Load trainable parameters, as `trained_state` returns them."""
        self.model.load_state_dict(state, strict=False)


@torch.no_grad()
def all_finite(logits: Tensor) -> bool:
    """Whether all values are finite; with a learning rate that is too high they are not."""
    return bool(torch.isfinite(logits).all())


def diverged(learning_rates: Iterable[float | None]) -> JobError:
    """The error for a method of which no trial had finite logits after its first epoch."""
    rates = ", ".join(f"{rate:g}" for rate in sorted({rate for rate in learning_rates if rate}))
    return JobError(f"training diverged in its first epoch at learning rates {rates}; lower train.lr")
