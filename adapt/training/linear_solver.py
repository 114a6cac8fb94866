"""Linear probes solved to their optimum: the loss is convex, so no learning rate could give a better one.

Solutions are reached from the strong weight decays to the weak, each from what the last two point to. The decays on the
way are the same for every search, so that a point of one is the same model as that point alone.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adapt.methods.readout import Readout
from adapt.training.candidate import Candidate, all_finite
from adapt.training.newton import LinearProblem, Solution
from adapt.training.objective import Objective
from store.console.progress import progress
from store.errors import JobError, Note

_WAY = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


@dataclass(frozen=True)
class Pooled:
    """Pooled features and labels of the rows to train on and of those to choose by."""

    features: Float[Tensor, "samples features"]
    labels: Shaped[Tensor, "samples ..."]
    val_features: Float[Tensor, "rows features"]
    val_labels: Shaped[Tensor, "rows ..."]


def solve_heads(candidates: Sequence[Candidate], data: Pooled, objective: Objective, describe: str) -> float:
    """Solve the head of every candidate, all with the same pooling; returns the seconds that a pass took.

    The minimized function is the mean loss + weight_decay / 2 times the squared weights, without the bias: that of
    scikit-learn's LogisticRegression with C = 1 / (samples x weight_decay).

    Warns where one is not found in a hundred steps of Newton's method, or does not exist.

    Raises:
        JobError: a feature is not finite.
    """
    if not all_finite(data.features):
        raise JobError("the pooled features hold a value that is not finite: check the weights of the backbone")
    started, readout = time.perf_counter(), readout_of(candidates[0])
    problem = LinearProblem(readout.standardized(data.features), data.labels, objective)
    way = _Way(problem, problem.zero(readout.head.out_features))
    with progress(describe, len(candidates), "solutions") as advance:
        for candidate in sorted(candidates, key=lambda candidate: -candidate.weight_decay):
            solution = way.solve(candidate.weight_decay)
            if not solution.found:
                _warn(candidate.weight_decay, solution.passes)
            _take(readout_of(candidate), *problem.head(solution.weights))
            with torch.no_grad():
                logits = readout_of(candidate).classify(data.val_features)
            candidate.consider(objective.judge(logits.cpu(), data.val_labels.cpu()), solution.passes)
            advance(1)
    return (time.perf_counter() - started) / way.passes


def readout_of(candidate: Candidate) -> Readout:
    """The read-out of a candidate's model."""
    readout = candidate.model.readout
    assert isinstance(readout, Readout)
    return readout


def _take(readout: Readout, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        readout.head.weight.copy_(weight)
        readout.head.bias.copy_(bias)


def _warn(decay: float, passes: int) -> None:
    text = f"the linear probe of weight decay {decay:g} is not at its optimum after {passes:,} passes over the samples"
    hint = "" if decay else "; of classes that a linear map separates there is none: choose a weight_decay above 0"
    warnings.warn(text + hint, Note, stacklevel=3)


class _Way:
    """Solutions of one problem at ever weaker decays."""

    def __init__(self, problem: LinearProblem, zero: Tensor) -> None:
        self._problem, self._zero = problem, zero
        self._steps: list[tuple[float, Solution]] = []  # those of the way so far
        self.passes = 0

    def solve(self, decay: float) -> Solution:
        """The solution at a decay no stronger than those before; its passes are all that lead to it from zero."""
        for step in _WAY[len(self._steps) :]:
            if step >= decay:
                self._steps.append((step, self._solve_next(step)))
        if self._steps and self._steps[-1][0] == decay:
            return self._steps[-1][1]
        return self._solve_next(decay)

    def _solve_next(self, decay: float) -> Solution:
        solution = self._problem.minimize(decay, self._towards(decay))
        self.passes += solution.passes
        before = self._steps[-1][1].passes if self._steps else 0
        return replace(solution, passes=before + solution.passes)

    def _towards(self, decay: float) -> Tensor:
        """The line through the last two, over the logarithm of the decay."""
        if not self._steps:
            return self._zero
        last, weights = self._steps[-1][0], self._steps[-1][1].weights
        if len(self._steps) == 1 or not decay:
            return weights
        before, weights_before = self._steps[-2][0], self._steps[-2][1].weights
        return weights + (weights - weights_before) * (math.log(decay / last) / math.log(last / before))
