"""Kronecker adaptation (KAdaptation; He et al., AAAI 2023, arXiv 2203.16329).

    dW = scale * sum_i A_i (x) (u_i v_i^T)      i = 1 ... n;  A_i (n, n);  u_i (out / n, r);  v_i (in / n, r)

All blocks share the slow factors A_i, one set for each target; each map has its own fast factors u_i and v_i. With
`slow_rank` s, A_i = a_i b_i^T with s columns. 4Ldr + 2n^3 parameters for q and v in L blocks d wide.

The paper's: the decomposition; q and v as targets; n = 4 in Table 1, and n = 32, r = s = 1 and one bias a block for
both in its public code. Ours: u starts at zero, v and A do not (in the public code u and v both start at zero and never
receive a gradient), scale 1, and training without dW. With x and y cut into n pieces,

    z_ib = v_i^T x_b        w_ia = sum_b A_i[a, b] z_ib        y_a = scale * sum_i u_i w_ia

and with slow factors of rank s, dW is a product of (out, n r s) columns a_i (x) u_i and (n r s, in) rows b_i (x) v_i.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import LEGAL_TARGETS, TargetModule, Targets, TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from adapt.methods.in_backbone.updated_linear import WeightUpdate, add_update, frozen_linear
from store.config import PositiveInt
from store.errors import UserError


class KroneckerOptions(TunedOptions):
    """Options of `kronecker`.

    Args:
        n: how many products, and the side of their slow factors; must divide the targets' widths.
        rank: r, of the fast factors.
        slow_rank: of the slow factors; null: full.
        scale: of the update.
        bias: one bias a block, which all its targets add.
        targets: as of lora; or auto: the module with the lower intrinsic dimension, measured within a run.
    """

    n: PositiveInt = 4
    rank: PositiveInt = 1
    slow_rank: PositiveInt | None = Field(None, description="a positive whole number, or null for full slow factors")
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    bias: bool = False
    targets: Targets | Literal["auto"] = Field(("q", "v"), description=f"{LEGAL_TARGETS}, or auto within a run")

    @property
    def needs_measurement(self) -> bool:
        """See `MethodOptions.needs_measurement`."""
        return self.targets == "auto"


class SlowFactors(nn.Module):
    """A_1 ... A_n of one target, which all blocks share: a module stays shared when the model is copied or moved.

    Args:
        n: how many factors, and their side.
        rank: s, of each factor; None for full ones.
        device: where they are created.
    """

    def __init__(self, n: int, rank: int | None, device: torch.device) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.full = _uniform((n, n, n), n**-0.5, device)
        else:  # the product of the two has the spread of `full`
            self.left, self.right = (_uniform((n, n, rank), (3 / (n * rank)) ** 0.25, device) for _ in range(2))

    def forward(self) -> Float[Tensor, "n n n"]:
        """The full factors."""
        return self.full if self.rank is None else torch.einsum("ias,ibs->iab", self.left, self.right)


class SharedBias(nn.Module):
    """The bias that all targets of a block add; a module, so that it stays shared as well.

    Args:
        width: of the targets.
        device: where it is created.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, device=device))


class KroneckerUpdate(WeightUpdate):
    """The sum of Kronecker products for one target of one block.

    Args:
        target: the linear map, which gives the shapes.
        slow: the slow factors of this target.
        shared: the bias of this block, if it has one.
        options: see `KroneckerOptions`.
    """

    def __init__(
        self, target: TargetModule, slow: SlowFactors, shared: SharedBias | None, options: KroneckerOptions
    ) -> None:
        super().__init__()
        linear, n, rank = frozen_linear(target), options.n, options.rank
        device, inputs = linear.weight.device, linear.in_features // n
        self.slow, self.shared, self.scale = slow, shared, options.scale
        self.u = nn.Parameter(torch.zeros(n, target.out_features // n, rank, device=device))
        self.v = _uniform((n, inputs, rank), inputs**-0.5, device)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """See `WeightUpdate.forward`."""
        if self.slow.rank is not None:
            return F.linear(F.linear(x, self._down()), self._up(), self.bias_delta())
        factors = (self.slow(), self.scale * self.u, self.v)
        y: Tensor = _Contract.apply(x, *(factor.to(x.dtype) for factor in factors))  # autocast does not reach inside
        bias = self.bias_delta()
        return y if bias is None else y + bias.to(y.dtype)

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """See `WeightUpdate.delta`."""
        blocks = torch.einsum("iab,ipr,iqr->apbq", self.slow(), self.scale * self.u, self.v)
        return blocks.flatten(2).flatten(0, 1)

    def bias_delta(self) -> Float[Tensor, "outputs"] | None:
        """See `WeightUpdate.bias_delta`."""
        return None if self.shared is None else self.shared.bias

    def _up(self) -> Float[Tensor, "outputs hidden"]:
        """The columns a_i (x) u_i, scaled."""
        return torch.einsum("ias,ipr->apirs", self.slow.left, self.scale * self.u).flatten(2).flatten(0, 1)

    def _down(self) -> Float[Tensor, "hidden inputs"]:
        """The rows b_i (x) v_i."""
        return torch.einsum("ibs,iqr->irsbq", self.slow.right, self.v).flatten(3).flatten(0, 2)


class _Contract(torch.autograd.Function):
    """y of the formula at the top, by matrix products.

    The backward pass recomputes z and w from x: they are wider than x if n^2 > in, so they are not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slow: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, slow, u, v)
        _, w = _hidden(x, slow, _rows(v))
        return (w.T @ _rows(u)).view(*x.shape[:-1], u.shape[0] * u.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, slow, u, v = ctx.saved_tensors
        n, (u_rows, v_rows) = len(slow), (_rows(u), _rows(v))
        z, w = _hidden(x, slow, v_rows)
        grad_y = grads[0].reshape(-1, u.shape[1])
        grad_u = w @ grad_y
        grad_w = (u_rows @ grad_y.T).view(n, -1, n)
        grad_slow = grad_w.mT @ z
        grad_z = (grad_w @ slow).view(len(v_rows), -1)
        grad_v = grad_z @ x.reshape(-1, v.shape[1])
        grad_x = (grad_z.T @ v_rows).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_slow, _from_rows(grad_u, u), _from_rows(grad_v, v)


def _hidden(x: Tensor, slow: Tensor, v_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute z (n, rank * tokens, n) and w (n * rank, tokens * n); this order of axes needs no transposed copies."""
    n = len(slow)
    z = (v_rows @ x.reshape(-1, v_rows.shape[1]).T).view(n, -1, n)
    return z, (z @ slow.mT).view(len(v_rows), -1)


def _rows(factors: Float[Tensor, "n width rank"]) -> Float[Tensor, "n_rank width"]:
    return factors.mT.flatten(0, 1)


def _from_rows(
    rows: Float[Tensor, "n_rank width"], like: Float[Tensor, "n width rank"]
) -> Float[Tensor, "n width rank"]:
    return rows.view(len(like), -1, like.shape[1]).mT


def inject_kronecker(vit: TargetViT, options: KroneckerOptions) -> None:
    """Add a sum of Kronecker products to every target of every block.

    Raises:
        UserError: `n` does not divide the widths of the targets; a bias for targets of several widths; `auto`, which a
            run replaces (`adapt.job.intrinsic_dimension`).
    """
    if options.targets == "auto":
        raise UserError(f"targets: auto is measured within a run (`sidecache run`); legal here: {LEGAL_TARGETS}")
    blocks = list(zip(*(vit.target_modules(name) for name in options.targets), strict=True))
    _require_widths([target for block in blocks for target in block], options)
    device = frozen_linear(blocks[0][0]).weight.device
    slow_factors = [SlowFactors(options.n, options.slow_rank, device) for _ in options.targets]
    for block in blocks:
        shared = SharedBias(block[0].out_features, device) if options.bias else None
        for target, slow in zip(block, slow_factors, strict=True):
            add_update(target, KroneckerUpdate(target, slow, shared, options))


def _require_widths(targets: Sequence[TargetModule], options: KroneckerOptions) -> None:
    widths = {target.out_features for target in targets}
    common = math.gcd(*widths, *(frozen_linear(target).in_features for target in targets))
    if common % options.n:
        legal = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        raise UserError(f"n: {options.n} does not divide the widths of the targets; legal on this backbone: {legal}")
    if options.bias and len(widths) > 1:
        raise UserError(
            f"bias: the targets share one bias, but are {sorted(widths)} wide; set bias: false or choose targets alike"
        )


def _uniform(shape: tuple[int, ...], bound: float, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device).uniform_(-bound, bound))
