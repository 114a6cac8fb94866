"""Kronecker adaptation (KAdaptation; He et al., AAAI 2023, arXiv 2203.16329).

    dW = scale * sum_i A_i (x) (u_i v_i^T)      i = 1 ... n;  A_i (n, n);  u_i (out / n, r);  v_i (in / n, r)

All blocks share the slow factors A_i, one set for each target; the fast factors u_i and v_i are those of one map. With
`slow_rank` s, A_i = a_i b_i^T with s columns.

The paper's: the decomposition; q and v as targets; n = 32, r = s = 1 and one bias a block for both, as in its public
code. Ours: u starts at zero, v and A do not (in the public code u and v both start at zero and receive no gradient,
ever), scale 1, and training without dW. With x and y as n pieces,

    z_ib = v_i^T x_b        w_ia = sum_b A_i[a, b] z_ib        y_a = scale * sum_i u_i w_ia

and with slow factors of rank s, dW is a product of (out, n r s) columns a_i (x) u_i and (n r s, in) rows b_i (x) v_i.
"""

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.linear_updates import LEGAL_TARGETS, Target, Targets, Update, add_update, frozen_linear
from adapt.methods.in_backbone.target_modules import TargetModule, Vit
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt
from store.errors import UserError


class KroneckerOptions(TunedOptions):
    """Options of `kronecker`; see `inject_kronecker`."""

    n: PositiveInt = 32
    rank: PositiveInt = 1
    slow_rank: PositiveInt | None = Field(None, description="a positive whole number, or null for full slow factors")
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    bias: bool = False
    targets: Targets | Literal["auto"] = Field(("q", "v"), description=f"{LEGAL_TARGETS}, or auto within a run")


class SlowFactors(nn.Module):
    """A_1 ... A_n of one target, in a module of its own: that stays shared when the model is copied or moved."""

    def __init__(self, n: int, rank: int | None, device: torch.device) -> None:
        super().__init__()
        self.rank = rank
        if rank is None:
            self.full = _uniform((n, n, n), n**-0.5, device)
        else:  # the product of the two has the spread of `full`
            self.left, self.right = (_uniform((n, n, rank), (3 / (n * rank)) ** 0.25, device) for _ in range(2))

    def forward(self) -> Float[Tensor, "n n n"]:
        """The factors, multiplied out."""
        return self.full if self.rank is None else torch.einsum("ias,ibs->iab", self.left, self.right)


class SharedBias(nn.Module):
    """The bias that all targets of a block add, in a module of its own for the same reason."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, device=device))


class KroneckerUpdate(Update):
    """The sum of Kronecker products of one target in one block."""

    def __init__(
        self,
        linear: nn.Linear,
        outputs: int,
        slow: SlowFactors,
        n: int,
        rank: int,
        scale: float,
        shared: SharedBias | None,
    ) -> None:
        super().__init__()
        device, inputs = linear.weight.device, linear.in_features // n
        self.slow, self.shared, self.scale = slow, shared, scale
        self.u = nn.Parameter(torch.zeros(n, outputs // n, rank, device=device))
        self.v = _uniform((n, inputs, rank), inputs**-0.5, device)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """See `Update.forward`."""
        if self.slow.rank is not None:
            return F.linear(F.linear(x, self._down()), self._up(), self.bias_delta())
        factors = (self.slow(), self.scale * self.u, self.v)
        y: Tensor = _Contract.apply(x, *(factor.to(x.dtype) for factor in factors))  # its own backward has no autocast
        bias = self.bias_delta()
        return y if bias is None else y + bias.to(y.dtype)

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """See `Update.delta`."""
        blocks = torch.einsum("iab,ipr,iqr->apbq", self.slow(), self.scale * self.u, self.v)
        return blocks.flatten(2).flatten(0, 1)

    def bias_delta(self) -> Float[Tensor, "outputs"] | None:
        """See `Update.bias_delta`."""
        return None if self.shared is None else self.shared.bias

    def _up(self) -> Float[Tensor, "outputs hidden"]:
        return torch.einsum("ias,ipr->apirs", self.slow.left, self.scale * self.u).flatten(2).flatten(0, 1)

    def _down(self) -> Float[Tensor, "hidden inputs"]:
        return torch.einsum("ibs,iqr->irsbq", self.slow.right, self.v).flatten(3).flatten(0, 2)


class _Contract(torch.autograd.Function):
    """y of the formula above, from matrix products alone.

    Of z and w, which are wider than x where n^2 > in, nothing is kept: the backward pass computes them again from x.
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
        return grad_x, grad_slow, _factors(grad_u, u), _factors(grad_v, v)


def _hidden(x: Tensor, slow: Tensor, v_rows: Tensor) -> tuple[Tensor, Tensor]:
    """z (n, rank * tokens, n) and w (n * rank, tokens * n); the tokens stand inside, which spares transposed copies."""
    n = len(slow)
    z = (v_rows @ x.reshape(-1, v_rows.shape[1]).T).view(n, -1, n)
    return z, (z @ slow.mT).view(len(v_rows), -1)


def _rows(factors: Float[Tensor, "n width rank"]) -> Float[Tensor, "n_rank width"]:
    return factors.mT.flatten(0, 1)


def _factors(rows: Float[Tensor, "n_rank width"], like: Float[Tensor, "n width rank"]) -> Float[Tensor, "n width rank"]:
    return rows.view(len(like), -1, like.shape[1]).mT


def inject_kronecker(
    vit: Vit,
    n: int = 32,
    rank: int = 1,
    slow_rank: int | None = None,
    scale: float = 1.0,
    bias: bool = False,
    targets: tuple[Target, ...] | Literal["auto"] = ("q", "v"),
) -> None:
    """Give every target in every block a sum of Kronecker products.

    Args:
        n: how many there are, and the size of the slow factors.
        rank: r, of the fast factors.
        slow_rank: s, of the slow factors; None for full ones.
        scale: of the update.
        bias: whether a block has a bias, which all its targets add.
        targets: which linear maps of a block; a run replaces `auto` (`adapt.job.intrinsic_dimension`).

    Raises:
        UserError: `n` does not divide the widths of the targets; a bias for targets of several widths; `auto`.
    """
    if isinstance(targets, str):
        raise UserError(f"targets: auto is measured within a run (`sidecache run`); legal here: {LEGAL_TARGETS}")
    places = {target: vit.places(target) for target in targets}
    _check(n, bias, [place for some in places.values() for place in some])
    device = frozen_linear(places[targets[0]][0]).weight.device
    slow = {target: SlowFactors(n, slow_rank, device) for target in targets}
    for block in zip(*places.values(), strict=True):
        shared = SharedBias(_outputs(block[0]), device) if bias else None
        for target, place in zip(targets, block, strict=True):
            linear, outputs = frozen_linear(place), _outputs(place)
            add_update(place, KroneckerUpdate(linear, outputs, slow[target], n, rank, scale, shared))


def _check(n: int, bias: bool, places: list[TargetModule]) -> None:
    widths = {_outputs(place) for place in places}
    common = math.gcd(*widths, *(frozen_linear(place).in_features for place in places))
    if common % n:
        legal = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        raise UserError(f"n: {n} does not divide the widths of the targets; legal on this backbone: {legal}")
    if bias and len(widths) > 1:
        raise UserError(
            f"bias: the targets share one bias, but are {sorted(widths)} wide; set bias: false or choose targets alike"
        )


def _outputs(place: TargetModule) -> int:
    return place.stop - place.start


def _uniform(shape: tuple[int, ...], bound: float, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device).uniform_(-bound, bound))
