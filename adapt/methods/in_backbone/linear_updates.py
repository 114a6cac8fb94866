"""Changes of frozen linear maps: y = W x + b, and on chosen rows of the output + dW x + db.

A method says what dW and db are by an `Update`; q and v of one fused qkv map are two updates of it. dW itself is built
for merging only (see `adapt.methods.in_backbone.merge`): training goes through `Update.forward`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from adapt.methods.in_backbone.target_modules import TARGETS, TargetModule

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
LEGAL_TARGETS = f"a list of {', '.join(TARGETS)}, each of them once"


def _each_once(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    if len(set(targets)) < len(targets):
        raise ValueError("a target is given twice")
    return targets


Targets = Annotated[
    tuple[Target, ...],
    Field(min_length=1, strict=False, description=LEGAL_TARGETS),
    AfterValidator(_each_once),
]


class Update(nn.Module):
    """What a method adds to some rows of a linear map; zero until training moves it."""

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """dW x + db, without dW; under autocast, x has its type already."""
        raise NotImplementedError

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """dW."""
        raise NotImplementedError

    def bias_delta(self) -> Float[Tensor, "outputs"] | None:
        """db, where there is one."""
        return None


class UpdatedLinear(nn.Module):
    """A frozen linear map with updates, in the place of the map.

    `weight` and `bias` are those of the whole, for callers that read them past the module; they are computed anew each
    time, which `forward` never does.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.updates: Any = nn.ModuleList()  # each an Update
        self.in_features, self.out_features = base.in_features, base.out_features
        self.slices: list[tuple[int, int]] = []

    def add(self, update: Update, start: int, stop: int) -> None:
        """Let an update change the output from row `start` to row `stop`."""
        self.updates.append(update)
        self.slices.append((start, stop))

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The frozen map's output with every update added to its slice."""
        x = _as_autocast(x)  # once for all: each map would make, and keep for the backward pass, a copy of its own
        out: Tensor = _AddToSlices.apply(self.base(x), self.slices, *(update(x) for update in self.updates))
        return out

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The frozen weight with every dW added to its rows."""
        return self._add([update.delta() for update in self.updates], self.base.weight)

    @property
    def bias(self) -> Float[Tensor, "outputs"] | None:
        """The frozen bias (zero where there is none) with every db added; None where both are missing."""
        bias, changes = self.base.bias, [update.bias_delta() for update in self.updates]
        if all(change is None for change in changes):
            return bias
        return self._add(changes, self.base.weight.new_zeros(self.out_features) if bias is None else bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear map with the updates folded in; it has a bias where the map or an update has one."""
        bias = self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return linear

    def _add(self, changes: Sequence[Tensor | None], tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        for (start, stop), change in zip(self.slices, changes, strict=True):
            if change is not None:
                tensor[start:stop].add_(change)
        return tensor


class _AddToSlices(torch.autograd.Function):
    """`out[..., start:stop] += change` for every change: nothing is copied here, nor on the way back.

    Plain indexing would copy the gradient of the whole of `out` once for every slice.
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


def add_update(place: TargetModule, update: Update) -> None:
    """Put an update on a linear map, beside those that it may have."""
    linear = place.linear
    if not isinstance(linear, UpdatedLinear):
        assert isinstance(linear, nn.Linear)
        linear = UpdatedLinear(linear)
        setattr(place.parent, place.name, linear)
    linear.add(update, place.start, place.stop)


def frozen_linear(place: TargetModule) -> nn.Linear:
    """The linear map itself, updated or not."""
    linear = place.linear
    linear = linear.base if isinstance(linear, UpdatedLinear) else linear
    assert isinstance(linear, nn.Linear)
    return linear


def update_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the updates, by name: those that are trained, and those that stay as they were drawn."""
    paths = tuple(f"{path}." for path, child in module.named_modules() if isinstance(child, Update))
    return {name: tensor for name, tensor in module.named_parameters() if name.startswith(paths)}


def _as_autocast(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The input as autocast would hand it to a linear map."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
