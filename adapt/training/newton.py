"""Newton's method for linear heads: a convex loss of the logits, plus weight_decay / 2 times the squared weights.

A step comes from preconditioned conjugate gradients in float32, as a rough step will do; losses and gradients are
float64, as those of weak decays drown in the rounding of float32. The inputs are rotated to their principal axes, along
which the Hessian of every class is taken to be diagonal: the preconditioner.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from adapt.training.objective import Expansion, Objective

_MOST_STEPS, _MOST_PRODUCTS, _MOST_HALVINGS = 100, 500, 30
_RESIDUAL = 0.1  # of a step's linear equations, in the preconditioner's norm: leaves a hundredth of what a step gains
_GAIN = 3e-5  # the share of the loss below which the gain that a step expects is small enough for it to be the last
_ENOUGH = 1e-4  # of the expected gain, for a step to be taken (Armijo's rule)
_NOTHING = 1e-5  # of the size of all inputs along the longest axis: what those along another may be rounding up to
_RELATIVE = torch.finfo(torch.float32).eps  # to which the spread along the axes is known
_ROWS = 16_384  # converted to float64 at a time


@dataclass(frozen=True)
class Solution:
    """A head in the coordinates of its problem, and what it took.

    Attributes:
        weights: the last column is the bias.
        passes: over all inputs, each as much work as a gradient.
        found: whether the loss is within about a hundred-thousandth of its optimum; of a loss that falls to zero as the
            weights grow, which has none, never.
    """

    weights: Float64[Tensor, "classes inputs"]
    passes: int
    found: bool


class LinearProblem:
    """Inputs, labels and a loss, to be minimized at any weight decay.

    Args:
        inputs: standardized features.
    """

    def __init__(
        self, inputs: Float[Tensor, "samples features"], labels: Shaped[Tensor, "samples ..."], objective: Objective
    ) -> None:
        self._labels, self._objective = labels, objective.to(inputs.device, torch.float64)
        spread, axes = torch.linalg.eigh((inputs.T @ inputs / len(inputs)).double())
        spread, axes = spread.clamp(min=_RELATIVE * float(spread[-1])), axes.float()
        turned = inputs @ axes
        size = torch.linalg.vector_norm(turned, dim=0)
        varies = size > _NOTHING * size.max()  # along the other axes there is only rounding
        self._axes = axes * varies
        self._inputs = torch.cat([turned.mul_(varies), inputs.new_ones(len(inputs), 1)], dim=1)
        self._spread = torch.cat([spread, spread.new_ones(1)]).float()

    def zero(self, num_classes: int) -> Float64[Tensor, "classes inputs"]:
        """The head that says nothing."""
        return self._inputs.new_zeros(num_classes, self._inputs.shape[1], dtype=torch.float64)

    def head(
        self, weights: Float64[Tensor, "classes inputs"]
    ) -> tuple[Float64[Tensor, "classes features"], Float64[Tensor, "classes"]]:
        """Weight and bias for the inputs as they were given."""
        return weights[:, :-1] @ self._axes.double().T, weights[:, -1]

    def minimize(self, weight_decay: float, start: Float64[Tensor, "classes inputs"]) -> Solution:
        """The optimum at one weight decay; any start leads there, a near one sooner."""
        penalty = start.new_full((start.shape[1],), weight_decay)
        penalty[-1] = 0
        weights, logits, passes = start, self._logits(start), 0
        local, loss = self._expand(logits, weights, penalty)
        for _ in range(_MOST_STEPS):
            gradient = self._pull_back(local.gradient) + penalty * weights
            step, products = self._step(gradient, local, penalty.float())
            moved, expected = self._logits(step), -float((gradient * step).sum())
            passes += products + 1
            for halving in range(_MOST_HALVINGS):
                size = 0.5**halving
                local, after = self._expand(logits + size * moved, weights + size * step, penalty)
                if after <= loss - _ENOUGH * size * expected:
                    break
            else:  # rounding hides what is left to gain
                break
            weights, logits, loss = weights + size * step, logits + size * moved, after
            if 0 <= expected <= _GAIN * loss:
                break
        else:
            return Solution(weights, passes, False)
        free = weights[:, -1:].expand_as(logits) if weight_decay else logits
        found = 0 <= expected <= _GAIN * loss and not self._objective.separates(free, self._labels)
        return Solution(weights, passes, found)

    def _step(
        self, gradient: Float64[Tensor, "classes inputs"], local: Expansion, penalty: Float[Tensor, "inputs"]
    ) -> tuple[Float64[Tensor, "classes inputs"], int]:
        """About minus the inverse Hessian times the gradient, and the number of products with the Hessian."""
        rows, shared = local.rows.float(), local.shared.float()
        x, scale = self._inputs, gradient.norm().clamp(min=torch.finfo(torch.float64).tiny)
        diagonal = (rows * (1 - shared)).sum(dim=1, keepdim=True) * self._spread + penalty
        inverse = 1 / diagonal.clamp(min=torch.finfo(torch.float32).tiny)

        residual = (-gradient / scale).float()
        step, conditioned = torch.zeros_like(residual), residual * inverse
        direction, size = conditioned.clone(), _dot(residual, conditioned)
        enough, products = _RESIDUAL**2 * size, 0
        while size > enough and products < _MOST_PRODUCTS:
            moved = (direction @ x.T).mul_(rows)
            curved = moved.addcmul_(shared, moved.sum(dim=0), value=-1) @ x
            curved.addcmul_(direction, penalty)
            products += 1
            if not (curvature := _dot(direction, curved)) > 0:  # rounding, where the loss is all but flat
                break
            step.add_(direction, alpha=size / curvature)
            residual.sub_(curved, alpha=size / curvature)
            torch.mul(residual, inverse, out=conditioned)
            before, size = size, _dot(residual, conditioned)
            torch.add(conditioned, direction, alpha=size / before, out=direction)
        return step.double() * scale, products

    def _logits(self, weights: Float64[Tensor, "classes inputs"]) -> Float64[Tensor, "classes samples"]:
        return torch.cat([weights @ part.double().T for part in torch.split(self._inputs, _ROWS)], dim=1)

    def _pull_back(self, residuals: Float64[Tensor, "classes samples"]) -> Float64[Tensor, "classes inputs"]:
        parts = zip(torch.split(residuals, _ROWS, dim=1), torch.split(self._inputs, _ROWS), strict=True)
        total = residuals.new_zeros(len(residuals), self._inputs.shape[1])
        for of_part, inputs in parts:
            total += of_part @ inputs.double()
        return total

    def _expand(self, logits: Tensor, weights: Tensor, penalty: Tensor) -> tuple[Expansion, float]:
        """The loss about these logits, and the minimized function."""
        local = self._objective.expand(logits, self._labels)
        return local, float(local.loss + 0.5 * (penalty * weights.square()).sum())


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.view(-1), other.view(-1)))
