"""Linear probes solved to their optimum: the loss is convex, so the whole training split goes into every step (L-BFGS).

No learning rate takes part, and none could give a better probe at the same weight decay. The solution for one weight
decay is where the search for the next weaker one starts.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adapt.candidate import Candidate, all_finite
from adapt.objective import Objective
from adapt.readout import Readout
from store.errors import JobError
from store.progress import progress

MAX_ITERATIONS = 500
# Of the mean loss: further steps do not change a prediction (benchmarks/probe.py, beside scikit-learn).
_GRADIENT_TOLERANCE, _CHANGE_TOLERANCE = 1e-5, 1e-8


@dataclass(frozen=True)
class Pooled:
    """Pooled features and labels of the rows to train on and of those to choose by."""

    features: Float[Tensor, "samples features"]
    labels: Shaped[Tensor, "samples ..."]
    val_features: Float[Tensor, "rows features"]
    val_labels: Shaped[Tensor, "rows ..."]


def solve_heads(candidates: Sequence[Candidate], data: Pooled, objective: Objective, describe: str) -> float:
    """Solve the head of every candidate, all with the same pooling; returns the seconds that one iteration took.

    The minimised function is the mean loss + weight_decay / 2 times the squared weights, without the bias: that of
    scikit-learn's LogisticRegression with C = 1 / (samples x weight_decay).

    Raises:
        JobError: a feature is not finite.
    """
    if not all_finite(data.features):
        raise JobError("the pooled features hold a value that is not finite: check the weights of the backbone")
    started, iterations, objective = time.perf_counter(), 0, objective.to(data.features.device)
    order = sorted(candidates, key=lambda candidate: -candidate.weight_decay)
    with progress(describe, len(order), "solutions") as advance:
        for before, candidate in itertools.pairwise([None, *order]):
            assert candidate is not None
            readout = readout_of(candidate)
            _start(readout, None if before is None else readout_of(before))
            used = _minimise(readout, data, objective, candidate.weight_decay)
            with torch.no_grad():
                logits = readout.classify(data.val_features)
            candidate.consider(objective.judge(logits.cpu(), data.val_labels.cpu()), used)
            iterations += used
            advance(1)
    return (time.perf_counter() - started) / max(1, iterations)


def readout_of(candidate: Candidate) -> Readout:
    """The read-out of a candidate's model."""
    readout = candidate.model.readout
    assert isinstance(readout, Readout)
    return readout


@torch.no_grad()
def _start(readout: Readout, solved: Readout | None) -> None:
    for name, tensor in readout.head.named_parameters():
        tensor.copy_(solved.head.get_parameter(name) if solved else torch.zeros_like(tensor))


def _minimise(readout: Readout, data: Pooled, objective: Objective, weight_decay: float) -> int:
    head = readout.head
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=MAX_ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=_CHANGE_TOLERANCE,
    )
    x = readout.standardised(data.features)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(head(x), data.labels) + 0.5 * weight_decay * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    used: int = optimizer.state[head.weight]["n_iter"]
    return used
