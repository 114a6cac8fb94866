"""Solves linear probes to their optimum by Newton's method: the loss is convex, so no learning rate is needed.

The solver follows a path of weight decays, from strong to weak, and starts each solution from an extrapolation of the
last two. The path is the same for every search, so that a trial gives the same model alone as within a search.
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

_PATH = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)  # weight decays


@dataclass(frozen=True)
class ProbeData:
    """Pooled features and labels of the training rows and of the validation rows."""

    features: Float[Tensor, "samples features"]
    labels: Shaped[Tensor, "samples ..."]
    val_features: Float[Tensor, "rows features"]
    val_labels: Shaped[Tensor, "rows ..."]


def solve_heads(candidates: Sequence[Candidate], data: ProbeData, objective: Objective, description: str) -> float:
    """Solve the head of every candidate.

    Minimizes the mean loss + weight_decay / 2 * (sum of squared weights, without the bias), as scikit-learn's
    LogisticRegression does with C = 1 / (samples * weight_decay). Warns where the optimum is not found in a hundred
    Newton steps, or does not exist.

    Args:
        candidates: linear probes with the same pooling.
        data: what they are solved on and evaluated on.
        objective: the loss.
        description: label of the progress bar.

    Returns:
        seconds of a pass over the samples.

    Raises:
        JobError: a feature is not finite.
    """
    require_finite(data.features)
    started, readout = time.perf_counter(), readout_of(candidates[0])
    problem = LinearProblem(readout.standardized(data.features), data.labels, objective)
    path = _DecayPath(problem, problem.zero(readout.head.out_features))
    with progress(description, len(candidates), "solutions") as advance:
        for candidate in sorted(candidates, key=lambda candidate: -candidate.weight_decay):
            solution = path.solve(candidate.weight_decay)
            warn_unless_found("the linear probe", candidate.weight_decay, solution)
            set_head(readout_of(candidate), *problem.head(solution.weights))
            candidate.keep(judge_head(candidate, data, objective), solution.passes)
            advance(1)
    return (time.perf_counter() - started) / path.passes


def require_finite(features: Float[Tensor, "samples features"]) -> None:
    """Refuse features that are not finite.

    Raises:
        JobError: they are not.
    """
    if not all_finite(features):
        raise JobError("the pooled features hold a value that is not finite: check the weights of the backbone")


@torch.no_grad()
def judge_head(candidate: Candidate, data: ProbeData, objective: Objective) -> tuple[float, float]:
    """The rank of a candidate on the validation rows; without any it is nan."""
    return judge_logits(readout_of(candidate).classify(data.val_features), data.val_labels, objective)


def judge_logits(
    logits: Float[Tensor, "rows classes"], labels: Shaped[Tensor, "rows ..."], objective: Objective
) -> tuple[float, float]:
    """The rank of logits on validation rows; without any it is nan."""
    if not len(labels):
        return math.nan, math.nan
    return objective.judge(logits.cpu(), labels.cpu())


def readout_of(candidate: Candidate) -> Readout:
    """The read-out of a candidate's model."""
    readout = candidate.model.readout
    assert isinstance(readout, Readout)
    return readout


def set_head(readout: Readout, weight: Tensor, bias: Tensor) -> None:
    """Give a read-out this head."""
    with torch.no_grad():
        readout.head.weight.copy_(weight)
        readout.head.bias.copy_(bias)


def warn_unless_found(what: str, decay: float, solution: Solution) -> None:
    """Warn of a solution that is not the optimum.

    Args:
        what: names it.
        decay: its weight decay.
        solution: the solution.
    """
    if solution.found:
        return
    text = f"{what} of weight decay {decay:g} is not at its optimum after {solution.passes:,} passes over the samples"
    hint = "" if decay else "; if the classes are linearly separable, there is none: choose a weight_decay above 0"
    warnings.warn(text + hint, Note, stacklevel=3)


class _DecayPath:
    """Solutions of one problem at descending weight decays.

    Attributes:
        passes: passes over the samples so far.
    """

    def __init__(self, problem: LinearProblem, zero: Tensor) -> None:
        self._problem, self._zero = problem, zero
        self._solved: list[tuple[float, Solution]] = []  # decays of `_PATH` and their solutions
        self.passes = 0

    def solve(self, decay: float) -> Solution:
        """The solution at a decay no stronger than the last one; its `passes` count from the start of the path."""
        for step in _PATH[len(self._solved) :]:
            if step >= decay:
                self._solved.append((step, self._solve_next(step)))
        if self._solved and self._solved[-1][0] == decay:
            return self._solved[-1][1]
        return self._solve_next(decay)

    def _solve_next(self, decay: float) -> Solution:
        solution = self._problem.minimize(decay, self._extrapolate(decay))
        self.passes += solution.passes
        passes_before = self._solved[-1][1].passes if self._solved else 0
        return replace(solution, passes=passes_before + solution.passes)

    def _extrapolate(self, decay: float) -> Tensor:
        """The line through the last two solutions, over the logarithm of the decay."""
        if not self._solved:
            return self._zero
        last, weights = self._solved[-1][0], self._solved[-1][1].weights
        if len(self._solved) == 1 or not decay:
            return weights
        previous, previous_weights = self._solved[-2][0], self._solved[-2][1].weights
        return weights + (weights - previous_weights) * (math.log(decay / last) / math.log(last / previous))
