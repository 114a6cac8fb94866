"""Adds trained updates to frozen linear maps: y = W x + b becomes (W + dW) x + b + db.

A method implements `WeightUpdate` for its dW and db, and `add_update` puts it on a linear map. An update may change
some rows of the output only, as q does in a fused qkv map. Training never builds dW, it calls `WeightUpdate.forward`;
dW is built to merge the update into the weights (see `merge.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.in_backbone.target_modules import TargetModule


class WeightUpdate(nn.Module):
    """An update of some rows of a linear map; zero until it is trained."""

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Compute dW x + db without dW; under autocast, x has autocast's type already."""
        raise NotImplementedError

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """Compute dW."""
        raise NotImplementedError

    def bias_delta(self) -> Float[Tensor, "outputs"] | None:
        """Compute db, if there is one."""
        return None


class UpdatedLinear(nn.Module):
    """A frozen linear map with updates, which takes the place of the map.

    Some callers read `weight` and `bias` instead of calling the module: both include the updates and are computed at
    each access, which `forward` never does.

    Args:
        base: the frozen map.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.updates: Any = nn.ModuleList()  # of WeightUpdate
        self.slices: list[tuple[int, int]] = []  # for each update, the rows of the output that it changes
        self.in_features, self.out_features = base.in_features, base.out_features

    def add(self, update: WeightUpdate, start: int, stop: int) -> None:
        """Add an update of the output from row `start` to row `stop`."""
        self.updates.append(update)
        self.slices.append((start, stop))

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The output of the frozen map, with every update added to its rows."""
        x = _as_autocast(x)  # once for all: else each map makes, and keeps for the backward pass, its own copy
        # out[..., start:stop] += update(x)
        out: Tensor = _AddToSlices.apply(self.base(x), self.slices, *(update(x) for update in self.updates))
        return out

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The frozen weight with every dW added to its rows."""
        return self._with_updates(self.base.weight, [update.delta() for update in self.updates])

    @property
    def bias(self) -> Float[Tensor, "outputs"] | None:
        """The frozen bias (zero if the map has none) with every db added; None if neither exists."""
        bias: Tensor | None = self.base.bias
        changes = [update.bias_delta() for update in self.updates]
        if all(change is None for change in changes):
            return bias
        if bias is None:
            bias = self.base.weight.new_zeros(self.out_features)
        return self._with_updates(bias, changes)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear map with the updates folded in; it has a bias if the map or an update has one."""
        bias = self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return linear

    def _with_updates(self, frozen: Tensor, changes: Sequence[Tensor | None]) -> Tensor:
        updated = frozen.clone()
        for (start, stop), change in zip(self.slices, changes, strict=True):
            if change is not None:
                updated[start:stop].add_(change)
        return updated


class _AddToSlices(torch.autograd.Function):
    """`out[..., start:stop] += change` for every change; neither pass copies anything.

    The backward pass of plain indexing copies the gradient of the whole of `out` once for every slice.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, slices: Sequence[tuple[int, int]], *changes: Tensor) -> Tensor:
        for (start, stop), change in zip(slices, changes, strict=True):
            out.narrow(-1, start, stop - start).add_(change)
        ctx.slices = slices
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad, None, *(grad[..., start:stop] for start, stop in ctx.slices)


def add_update(target: TargetModule, update: WeightUpdate) -> None:
    """Put an update on a linear map, beside other updates that it may have."""
    linear = target.module
    if not isinstance(linear, UpdatedLinear):
        assert isinstance(linear, nn.Linear)
        linear = UpdatedLinear(linear)
        setattr(target.parent, target.name, linear)
    linear.add(update, target.start, target.stop)


def frozen_linear(target: TargetModule) -> nn.Linear:
    """The frozen map of a target, with or without updates on it."""
    linear = target.module
    linear = linear.base if isinstance(linear, UpdatedLinear) else linear
    assert isinstance(linear, nn.Linear)
    return linear


def update_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of all updates in a module by name, also those that are not trained (A of `lora_fix`)."""
    paths = tuple(f"{path}." for path, child in module.named_modules() if isinstance(child, WeightUpdate))
    return {name: tensor for name, tensor in module.named_parameters() if name.startswith(paths)}


def _as_autocast(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cast an input as autocast does for a linear map."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
