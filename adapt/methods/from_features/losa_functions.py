"""The sums over the layers of LoSA with gradients by hand, which update buffers in place and keep only hidden units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_BYTES_IN_CACHE = 2**22
_gelu_backward = torch.ops.aten.gelu_backward


@dataclass(frozen=True)
class Frozen:
    """What hidden units are computed from, without gradient.

    Args:
        inputs: x of every layer.
        keep: factors of dropout of every layer, or None.
    """

    inputs: Sequence[Float[Tensor, "batch read dim"]]
    keep: Sequence[Float[Tensor, "models rank rows"]] | None


class LowRankUnits(torch.autograd.Function):
    """The hidden units h_i = keep_i * GELU(D_i x_i + shift_i + sum_{j<i} C_ij h_j) of all layers, for every model."""

    @staticmethod
    def forward(
        ctx: Any,
        frozen: Frozen,
        down: Float[Tensor, "layers models rank dim"],
        shift: Float[Tensor, "layers models rank"],
        mixing: Float[Tensor, "layers models rank units"],
    ) -> tuple[Float[Tensor, "_ units_and_one rows"], ...]:
        """Compute layers * rank units and a last one that is 1, for one group of models after the other.

        Args:
            ctx: what is kept for the backward pass.
            frozen: x and keep.
            down: D.
            shift: of the units before GELU.
            mixing: C of every layer, for the units of all layers; those from the layer itself on are not read.
        """
        models, rank = down.shape[1:3]
        rows, keep = [x.flatten(0, 1) for x in frozen.inputs], frozen.keep
        layers = zip(rows, down.flatten(1, 2), shift.flatten(1, 2), strict=True)
        before = [torch.addmm(s[:, None], d, x.T).view(models, rank, -1) for x, d, s in layers]
        groups = _groups(models, before)
        units = []
        for group in groups:
            of_group = down.new_ones(len(before[0][group]), len(before) * rank + 1, len(rows[0]))
            for layer, of_layer in enumerate(before):
                start = layer * rank
                if layer:
                    of_layer[group].baddbmm_(mixing[layer, group, :, :start], of_group[:, :start])
                hidden = F.gelu(of_layer[group])
                of_group[:, start : start + rank] = hidden if keep is None else hidden * keep[layer][group]
            units.append(of_group)
        ctx.rows, ctx.keep, ctx.groups = rows, keep, groups
        ctx.save_for_backward(mixing, *before, *units)
        return tuple(units)

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "_ units_and_one rows"]) -> tuple[Tensor | None, ...]:
        """The gradients of `down`, `shift` and `mixing`."""
        mixing, *saved = ctx.saved_tensors
        before, units = saved[: len(ctx.rows)], saved[len(ctx.rows) :]
        rank, of_mixing = before[0].shape[1], torch.zeros_like(mixing)
        of_before = [torch.empty_like(tensor) for tensor in before]
        for group, of_group, of_units in zip(ctx.groups, units, gradients, strict=True):
            gradient = of_units.clone(memory_format=torch.contiguous_format)
            for layer in reversed(range(len(before))):
                start = layer * rank
                of_hidden = gradient[:, start : start + rank]
                if ctx.keep is not None:
                    of_hidden = of_hidden * ctx.keep[layer][group]
                found = of_before[layer][group].copy_(_gelu_backward(of_hidden, before[layer][group]))
                if layer:
                    of_mixing[layer, group, :, :start] = found @ of_group[:, :start].mT
                    gradient[:, :start].baddbmm_(mixing[layer, group, :, :start].mT, found)
        of_down = [found.flatten(0, 1) @ x for found, x in zip(of_before, ctx.rows, strict=True)]
        of_shift = [found.sum(dim=2) for found in of_before]
        return None, torch.stack(of_down).view(*mixing.shape[:3], -1), torch.stack(of_shift), of_mixing


def _groups(models: int, before: Sequence[Float[Tensor, "models rank rows"]]) -> list[slice]:
    """Models that are computed together: on a CPU as many as fit into its cache, elsewhere all."""
    n_bytes = len(before) * before[0][0].nbytes
    size = max(1, _BYTES_IN_CACHE // n_bytes) if before[0].device.type == "cpu" else models
    return [slice(start, min(start + size, models)) for start in range(0, models, size)]


@dataclass(frozen=True)
class Maps:
    """What one update y <- y + up [keep * GELU(down (x + y) + bias), 1] is computed from, besides its maps.

    Args:
        x: tokens of the layer, without gradient.
        num_prefix: mix the tokens behind so many; None to mix channels.
        keep: factors of dropout for the hidden units, or None.
    """

    x: Float[Tensor, "batch read dim"]
    num_prefix: int | None
    keep: Float[Tensor, "groups rank inner"] | None

    def columns(self, tokens: Float[Tensor, "batch read dim"]) -> Float[Tensor, "groups mixed inner"]:
        """A view of tokens with the axis that is mixed in the middle."""
        return tokens.flatten(0, 1).T[None] if self.num_prefix is None else tokens[:, self.num_prefix :]


class SumOfUpdates(torch.autograd.Function):
    """The sum y of one update after the other, each of which reads the sum of those before."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Maps], *maps: Tensor) -> Float[Tensor, "batch read dim"]:
        """Sum the updates; `maps` are the tensors down, bias and up (with a column for its bias) of every step."""
        y, read = (steps[0].x.new_zeros(steps[0].x.shape) for _ in range(2))
        kept = []
        for number, step in enumerate(steps):
            down, bias, up = maps[3 * number : 3 * number + 3]
            torch.add(step.x, y, out=read)
            columns, updated = step.columns(read), step.columns(y)
            before = torch.baddbmm(bias[:, None], down.expand(len(columns), -1, -1), columns)
            hidden = before.new_ones(len(columns), up.shape[1], columns.shape[2])
            activated = F.gelu(before)
            hidden[:, :-1] = activated if step.keep is None else activated * step.keep
            updated.baddbmm_(up.expand(len(columns), -1, -1), hidden)
            kept += [before, hidden]
        ctx.steps = steps
        ctx.save_for_backward(y, *maps, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "batch read dim"]) -> tuple[Tensor | None, ...]:
        """The gradients of the maps; `gradient` becomes that of y before each step, and y what it was there."""
        y, *saved = ctx.saved_tensors
        maps, kept = saved[: 3 * len(ctx.steps)], saved[3 * len(ctx.steps) :]
        y, gradient, read = y.clone(), gradient.clone(memory_format=torch.contiguous_format), torch.empty_like(y)
        found = list[Tensor]()
        for number, step in reversed(list(enumerate(ctx.steps))):
            (down, _, up), (before, hidden) = maps[3 * number : 3 * number + 3], kept[2 * number : 2 * number + 2]
            columns, groups = step.columns(gradient), len(before)
            of_up = (hidden @ columns.mT).sum(dim=0).T
            of_hidden = up[:, :-1].T.expand(groups, -1, -1) @ columns
            of_before = _gelu_backward(of_hidden if step.keep is None else of_hidden * step.keep, before)
            # y before the step
            step.columns(y).baddbmm_(up.expand(groups, -1, -1), hidden, alpha=-1)
            torch.add(step.x, y, out=read)
            of_down = (of_before @ step.columns(read).mT).sum(dim=0)
            columns.baddbmm_(down.T.expand(groups, -1, -1), of_before)
            found = [of_down, of_before.sum(dim=(0, 2)), of_up, *found]
        return None, *found
