"""Linear probes solved to their optimum: the loss is convex, so the whole training split goes into every step (L-BFGS).

No learning rate takes part, and none could give a better probe at the same weight decay. Every solution starts at zero:
started at that of another weight decay, it would be found sooner, but a point of a search would be another model than
the same point alone.
"""

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from adapt.candidate import Candidate, all_finite
from adapt.objective import Objective
from adapt.readout import Readout
from store.errors import JobError, Note
from store.progress import progress

_MOST_ITERATIONS = 5_000  # of which 800 were the most that any search of benchmarks/probe.py needed
_HISTORY = 30  # steps that the curvature is taken from
# Of the mean loss, and as a share of the weight decay: the optimum of a weak one shows in smaller gradients.
_GRADIENT_TOLERANCE, _SHARE_OF_DECAY, _CHANGE_TOLERANCE = 1e-5, 0.03, 1e-12


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

    Warns where one is not found in the iterations that there are.

    Raises:
        JobError: a feature is not finite.
    """
    if not all_finite(data.features):
        raise JobError("the pooled features hold a value that is not finite: check the weights of the backbone")
    started, iterations, objective = time.perf_counter(), 0, objective.to(data.features.device, torch.float64)
    with progress(describe, len(candidates), "solutions") as advance:
        for candidate in candidates:
            readout = readout_of(candidate)
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


def _minimise(readout: Readout, data: Pooled, objective: Objective, weight_decay: float) -> int:
    head = copy.deepcopy(readout.head).double()  # gradients of weak decays drown in the rounding of float32
    for tensor in head.parameters():
        nn.init.zeros_(tensor)
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=_MOST_ITERATIONS,
        max_eval=25 * _MOST_ITERATIONS,  # what the line searches of all of them may take: no limit of its own
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=min(_GRADIENT_TOLERANCE, _SHARE_OF_DECAY * weight_decay or _GRADIENT_TOLERANCE),
        tolerance_change=_CHANGE_TOLERANCE,
    )
    x = readout.standardised(data.features).double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(head(x), data.labels) + 0.5 * weight_decay * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    readout.head.load_state_dict(head.state_dict())
    used: int = optimizer.state[head.weight]["n_iter"]
    if used >= _MOST_ITERATIONS:
        warnings.warn(
            f"the linear probe of weight decay {weight_decay:g} is not at its optimum after {used:,} iterations",
            Note,
            stacklevel=2,
        )
    return used
