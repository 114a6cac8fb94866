"""Newton's method for linear heads: minimizes a convex loss of the logits + weight_decay / 2 * squared weights.

Losses and gradients are float64: at weak decays, float32 rounding would hide the last gains. A step need not be exact
and is solved in float32, by preconditioned conjugate gradients. The inputs are rotated to their principal axes, where
the preconditioner takes the Hessian of every class as diagonal.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from adapt.training.objective import Expansion, Objective

_MAX_STEPS, _MAX_PRODUCTS, _MAX_HALVINGS = 100, 500, 30
_RESIDUAL = 0.1  # of the linear equations of a step, in the preconditioner's norm: costs a hundredth of a step's gain
_GAIN = 3e-5  # a step is the last one if it is expected to gain no more than this fraction of the loss
_ARMIJO = 1e-4  # fraction of the expected gain that a step must reach to be accepted
_CONSTANT = 1e-5  # an axis whose norm is below this fraction of the largest one holds only rounding
_RELATIVE = torch.finfo(torch.float32).eps  # relative precision of the spread along the axes
_ROWS = 16_384  # converted to float64 at a time


@dataclass(frozen=True)
class Solution:
    """A head in the coordinates of its problem.

    Attributes:
        weights: the last column is the bias.
        passes: passes over all inputs, each as much work as a gradient.
        found: whether the loss is within a few 1e-5 of its optimum. False if the classes are linearly separable without
            weight decay: the loss then falls to zero as the weights grow.
    """

    weights: Float64[Tensor, "classes inputs"]
    passes: int
    found: bool


class LinearProblem:
    """Inputs, labels and a loss, to be minimized at any weight decay.

    Args:
        inputs: standardized features.
        labels: their labels.
        objective: the loss.
    """

    def __init__(
        self, inputs: Float[Tensor, "samples features"], labels: Shaped[Tensor, "samples ..."], objective: Objective
    ) -> None:
        self._labels, self._objective = labels, objective.to(inputs.device, torch.float64)
        # rotate the inputs to their principal axes
        spread, axes = _principal_axes(inputs)
        spread, axes = spread.clamp(min=_RELATIVE * float(spread[-1])), axes.float()
        rotated = inputs @ axes
        # zero the axes that hold only rounding, and append a column of ones for the bias
        size = torch.linalg.vector_norm(rotated, dim=0)
        varies = size > _CONSTANT * size.max()
        self._axes = axes * varies
        self._inputs = torch.cat([rotated.mul_(varies), inputs.new_ones(len(inputs), 1)], dim=1)
        self._spread = torch.cat([spread, spread.new_ones(1)]).float()

    def zero(self, num_classes: int) -> Float64[Tensor, "classes inputs"]:
        """The all-zero head."""
        return self._inputs.new_zeros(num_classes, self._inputs.shape[1], dtype=torch.float64)

    def head(
        self, weights: Float64[Tensor, "classes inputs"]
    ) -> tuple[Float64[Tensor, "classes features"], Float64[Tensor, "classes"]]:
        """Weight and bias in the coordinates of the features."""
        return weights[:, :-1] @ self._axes.double().T, weights[:, -1]

    def minimize(self, weight_decay: float, start: Float64[Tensor, "classes inputs"]) -> Solution:
        """Find the optimum at one weight decay; a start near it saves steps."""
        penalty = start.new_full((start.shape[1],), weight_decay)
        penalty[-1] = 0  # the bias
        weights, logits, passes = start, self._logits(start), 0
        local, loss = self._expand(logits, weights, penalty)
        for _ in range(_MAX_STEPS):
            # Newton direction
            gradient = self._pull_back(local.gradient) + penalty * weights
            step, products = self._step(gradient, local, penalty.float())
            step_logits, expected = self._logits(step), -float((gradient * step).sum())
            passes += products + 1
            # backtracking line search
            for halving in range(_MAX_HALVINGS):
                size = 0.5**halving
                local, new_loss = self._expand(logits + size * step_logits, weights + size * step, penalty)
                if new_loss <= loss - _ARMIJO * size * expected:
                    break
            else:  # what is left to gain is smaller than rounding
                break
            weights, logits, loss = weights + size * step, logits + size * step_logits, new_loss
            if 0 <= expected <= _GAIN * loss:
                break
        else:
            return Solution(weights, passes, False)
        # without weight decay on them, weights (or biases) that separate the classes could grow forever
        free = weights[:, -1:].expand_as(logits) if weight_decay else logits
        found = 0 <= expected <= _GAIN * loss and not self._objective.separates(free, self._labels)
        return Solution(weights, passes, found)

    def _step(
        self, gradient: Float64[Tensor, "classes inputs"], local: Expansion, penalty: Float[Tensor, "inputs"]
    ) -> tuple[Float64[Tensor, "classes inputs"], int]:
        """About minus the inverse Hessian times the gradient, and the number of products with the Hessian."""
        rows, shared = local.rows.float(), local.shared.float()
        x, scale = self._inputs, gradient.norm().clamp(min=torch.finfo(torch.float64).tiny)
        # preconditioner: the inverse of the Hessian's diagonal
        diagonal = (rows * (1 - shared)).sum(dim=1, keepdim=True) * self._spread + penalty
        inverse = 1 / diagonal.clamp(min=torch.finfo(torch.float32).tiny)

        residual = (-gradient / scale).float()
        step, conditioned = torch.zeros_like(residual), residual * inverse
        direction, size = conditioned.clone(), _dot(residual, conditioned)
        tolerance, products = _RESIDUAL**2 * size, 0
        while size > tolerance and products < _MAX_PRODUCTS:
            # product with the Hessian: inputs^T (diag(rows) - shared rows^T) inputs direction + penalty * direction
            weighted = (direction @ x.T).mul_(rows)
            product = weighted.addcmul_(shared, weighted.sum(dim=0), value=-1) @ x
            product.addcmul_(direction, penalty)
            products += 1
            if not (curvature := _dot(direction, product)) > 0:  # rounding, where the loss is nearly flat
                break
            step.add_(direction, alpha=size / curvature)
            residual.sub_(product, alpha=size / curvature)
            torch.mul(residual, inverse, out=conditioned)
            previous_size, size = size, _dot(residual, conditioned)
            torch.add(conditioned, direction, alpha=size / previous_size, out=direction)
        return step.double() * scale, products

    def _logits(self, weights: Float64[Tensor, "classes inputs"]) -> Float64[Tensor, "classes samples"]:
        return torch.cat([weights @ part.double().T for part in torch.split(self._inputs, _ROWS)], dim=1)

    def _pull_back(self, residuals: Float64[Tensor, "classes samples"]) -> Float64[Tensor, "classes inputs"]:
        """From the gradient in the logits to the gradient in the weights."""
        parts = zip(torch.split(residuals, _ROWS, dim=1), torch.split(self._inputs, _ROWS), strict=True)
        total = residuals.new_zeros(len(residuals), self._inputs.shape[1])
        for of_part, inputs in parts:
            total += of_part @ inputs.double()
        return total

    def _expand(self, logits: Tensor, weights: Tensor, penalty: Tensor) -> tuple[Expansion, float]:
        """The derivatives of the loss at these logits, and the value of the minimized function."""
        local = self._objective.expand(logits, self._labels)
        return local, float(local.loss + 0.5 * (penalty * weights.square()).sum())


def _principal_axes(
    inputs: Float[Tensor, "samples features"],
) -> tuple[Float64[Tensor, "axes"], Float64[Tensor, "features axes"]]:
    """The mean square along every principal axis, ascending, and the axes.

    Of fewer samples than features only the axes that the samples span: weights along the others stay zero.
    """
    n_samples, n_features = inputs.shape
    if n_samples >= n_features:
        return torch.linalg.eigh((inputs.T @ inputs / n_samples).double())  # type: ignore[no-any-return]
    exact = inputs.double()  # in float32, axes of little spread would not be orthogonal
    spread, combinations = torch.linalg.eigh(exact @ exact.T / n_samples)
    # an axis without spread would be a direction of rounding, not orthogonal to the others
    varies = spread > _CONSTANT**2 * spread[-1]
    axes = exact.T @ (combinations * varies)
    return spread * varies, axes / torch.linalg.vector_norm(axes, dim=0).clamp(min=torch.finfo(axes.dtype).tiny)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.view(-1), other.view(-1)))
