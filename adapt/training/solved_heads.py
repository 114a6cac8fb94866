"""Solves the heads of trained models anew, on what the models have learned to give them.

A head that was trained in steps is seldom at its optimum when the last step is taken; that optimum costs a pass over
the training rows and a second of Newton's method.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from adapt.training.batches import Batches
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_logits
from adapt.training.linear_solver import judge_logits, readout_of, set_head, warn_unless_found
from adapt.training.newton import LinearProblem
from extract.forward.device import autocast


def solve_trained_heads(candidates: Sequence[Candidate], inputs: Batches, weight_decay: float, precision: str) -> None:
    """Solve the head of every candidate that was trained to the end, and judge it again.

    Args:
        candidates: trained models.
        inputs: features, or images for a single candidate.
        weight_decay: of the heads; see `adapt.training.linear_solver.solve_heads`.
        precision: of autocast.
    """
    solved = [candidate for candidate in candidates if not candidate.diverged and not candidate.was_dropped]
    if not solved:
        return
    rows = [np.union1d(candidate.data.rows, candidate.data.val_rows) for candidate in solved]
    read = predict_logits(solved, inputs, "train", rows, precision=precision, compute=_head_inputs)
    for candidate, own_rows, values in zip(solved, rows, read, strict=True):
        data, labels = candidate.data, inputs.labels("train")
        of_rows = values[np.searchsorted(own_rows, data.rows)].to(inputs.device)
        of_val_rows = values[np.searchsorted(own_rows, data.val_rows)]
        if not torch.isfinite(of_rows.square().sum()):
            continue  # training has gone astray: the head stays as it was trained
        _solve_head(candidate, of_rows, labels[torch.from_numpy(data.rows)].to(inputs.device), weight_decay)
        with torch.no_grad():
            logits = readout_of(candidate).head(of_val_rows.to(inputs.device))
        rank = judge_logits(logits, labels[torch.from_numpy(data.val_rows)], data.objective)
        candidate.keep(rank, candidate.best_epoch)


def _head_inputs(
    candidates: Sequence[Candidate], inputs: Any, device: torch.device, precision: str
) -> Iterator[Float[Tensor, "rows features"]]:
    """What the head of every candidate reads."""
    taken: list[Tensor] = []

    def take(_: nn.Module, given: tuple[Tensor]) -> None:
        taken.append(given[0].float())

    for candidate in candidates:
        hook = readout_of(candidate).head.register_forward_pre_hook(take)
        try:
            with autocast(device, precision):
                candidate.model(inputs)
        finally:
            hook.remove()
        yield taken.pop()


def _solve_head(
    candidate: Candidate,
    features: Float[Tensor, "rows features"],
    labels: Shaped[Tensor, "rows ..."],
    weight_decay: float,
) -> None:
    problem = LinearProblem(features, labels, candidate.data.objective)
    head = readout_of(candidate).head
    solution = problem.minimize(weight_decay, problem.zero(head.out_features))
    warn_unless_found(f"the solved head of {candidate.method}", weight_decay, solution)
    set_head(readout_of(candidate), *problem.head(solution.weights))
