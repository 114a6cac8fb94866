"""Makes the optimizer of a candidate and its learning rate schedule."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

Optimizer = Literal["adamw", "sgd"]


def make_optimizer(
    model: Any, name: Optimizer, lr: float, weight_decay: float, head_lr: float | None
) -> torch.optim.Optimizer:
    """Make AdamW, or SGD with Nesterov momentum.

    Weight decay applies to every trainable tensor of two or more dimensions: weights of linear maps and convolutions,
    but also class token, positions, prompts, queries and bias tables. It does not apply to vectors: biases, norms.

    Args:
        model: model of a method; its trainable parameters are optimized.
        name: which optimizer.
        lr: learning rate.
        weight_decay: weight decay of matrices.
        head_lr: learning rate of the head; None for `lr`.

    Returns:
        the optimizer, with two parameter groups (matrices and vectors) for the body and two for the head.
    """
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    head = {id(tensor) for tensor in model.readout.head.parameters()}
    groups: list[dict[str, Any]] = []
    for of_head, rate in ((False, lr), (True, head_lr or lr)):
        tensors = [tensor for tensor in trained if (id(tensor) in head) == of_head]
        groups += [
            {"params": [tensor for tensor in tensors if tensor.ndim > 1], "weight_decay": weight_decay, "lr": rate},
            {"params": [tensor for tensor in tensors if tensor.ndim <= 1], "weight_decay": 0.0, "lr": rate},
        ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Make a factor of the learning rate by step: linear warmup, then a cosine to zero.

    Args:
        steps: steps in all.
        warmup: fraction of the steps; at least one step, unless it is 0.
    """
    warmup_steps = max(1, round(warmup * steps)) if warmup else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor
