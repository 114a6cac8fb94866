"""A model in training, and the best that validation has seen of it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass
class Candidate:
    """A model with its learning rate (None where none is needed) and weight decay, and its best state so far."""

    model: nn.Module
    lr: float | None
    weight_decay: float
    best: State = field(default_factory=dict)
    best_epoch: int = 0
    score: float = -math.inf
    loss: float = math.inf

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that the model reads, ascending."""
        layers: tuple[int, ...] = self.model.layers  # type: ignore[assignment]
        return layers

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the score, then the loss where scores are equal."""
        return self.score, -self.loss

    def consider(self, rank: tuple[float, float], epoch: int) -> None:
        """Keep the present weights if they rank above the best so far."""
        if rank > self.rank:
            self.score, self.loss, self.best_epoch = rank[0], -rank[1], epoch
            self.best = self.trained_state()

    def trained_state(self) -> State:
        """A copy of the parameters that training moves."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def load(self, state: State) -> None:
        """Put trained parameters back."""
        self.model.load_state_dict(state, strict=False)


@torch.no_grad()
def all_finite(logits: Tensor) -> bool:
    """Whether a model is still usable: a rate too high drives it to infinity."""
    return bool(torch.isfinite(logits).all())
