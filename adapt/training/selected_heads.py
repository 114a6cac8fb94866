"""Solves linear heads twice: on all features, and then on those that the first head finds most useful."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adapt.methods.from_features.head2toe import Head2Toe
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import ProbeData, judge_head, readout_of, set_head, solve_heads, warn_unless_found
from adapt.training.newton import LinearProblem
from adapt.training.objective import Objective


def solve_selected_heads(
    candidates: Sequence[Candidate], data: ProbeData, objective: Objective, description: str
) -> float:
    """Solve the head of every candidate, select features by it, and solve it again on these.

    Args:
        candidates: of `head2toe`, with the same layers and pooling.
        data: what they are solved on and evaluated on.
        objective: the loss.
        description: label of the progress bar.

    Returns:
        seconds of a pass over the samples.

    Raises:
        JobError: a feature is not finite.
    """
    seconds = solve_heads(candidates, data, objective, description)
    features = readout_of(candidates[0]).standardized(data.features)
    for candidate in candidates:
        model, readout = candidate.model, readout_of(candidate)
        assert isinstance(model, Head2Toe)
        kept = most_useful(readout.head.weight.detach(), model.fraction)
        problem = LinearProblem(features[:, kept], data.labels, objective)
        solution = problem.minimize(candidate.weight_decay, problem.zero(readout.head.out_features))
        warn_unless_found("the head on the kept features", candidate.weight_decay, solution)
        of_kept, bias = problem.head(solution.weights)
        weight = of_kept.new_zeros(readout.head.weight.shape)
        weight[:, kept] = of_kept
        set_head(readout, weight, bias)
        candidate.keep(judge_head(candidate, data, objective), candidate.best_epoch + solution.passes)
    return seconds


def most_useful(weight: Float[Tensor, "classes features"], fraction: float) -> Int64[Tensor, "kept"]:
    """The features with the largest norms over all classes, ascending; at least one."""
    n_kept = max(1, round(fraction * weight.shape[1]))
    norms = torch.linalg.vector_norm(weight, dim=0)
    kept: Tensor = norms.topk(n_kept).indices.sort().values
    return kept
