"""The optimizer of a candidate, and its learning rate over time."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

Optimizer = Literal["adamw", "sgd"]


def make_optimizer(
    model: nn.Module, name: Optimizer, lr: float, weight_decay: float, head_lr: float | None
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; the head may have a rate of its own.

    Weight decay reaches every trained tensor of two dimensions and more: weights of linear maps and convolutions, and
    as well class token, positions, prompts, queries and bias tables. It spares biases, norms and whatever else is a
    vector.
    """
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    groups: list[dict[str, Any]] = []
    for of_head, rate in ((False, lr), (True, head_lr or lr)):
        tensors = [tensor for name, tensor in named if (".head." in name) == of_head]
        groups += [
            {"params": [tensor for tensor in tensors if tensor.ndim > 1], "weight_decay": weight_decay, "lr": rate},
            {"params": [tensor for tensor in tensors if tensor.ndim <= 1], "weight_decay": 0.0, "lr": rate},
        ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up over a share of the steps (one step at least, unless the share is 0), then a cosine to zero."""
    warm = max(1, round(warmup * steps)) if warmup else 0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
