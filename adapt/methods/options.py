"""The base class of all methods' options, and checks that several methods share."""

import math
from typing import Literal

from adapt.methods.feature_spec import FeatureSpec
from store.config import Every, Last, Layers, Spread
from store.errors import UserError
from store.layout import resolve_layers
from store.strict_model import StrictModel

SideLayers = Literal["auto"] | Layers  # of a side network: auto is at most `_MOST_LAYERS`, evenly spread
LAYERS_HELP = "all, a list such as [3, 7, 11], {every: k}, {spread: n} or {last: n}"
SIDE_LAYERS_HELP = f"auto, {LAYERS_HELP}"
_MOST_LAYERS = 4
_WIDEST = 4  # times the width of a token: as wide as the hidden layer of a usual MLP


class MethodOptions(StrictModel):
    """Options of a method, as an entry of `methods:` in pipeline.yaml gives them; every method has a `pool`."""

    @property
    def needs_measurement(self) -> bool:
        """Whether a run must measure the intrinsic dimension first, which then sets one of these options."""
        return False


def choose_layers(layers: SideLayers, spec: FeatureSpec) -> tuple[int, ...]:
    """Resolve the option `layers` to absolute block indices, ascending.

    A list names blocks of the backbone; auto, {every: k}, {spread: n} and {last: n} count those that the features
    hold, from the last one.

    Raises:
        UserError: a layer that the backbone or the features do not have.
    """
    if layers == "all":
        return spec.layers
    if layers == "auto":
        layers = Spread(spread=_MOST_LAYERS)
    if isinstance(layers, Spread):
        layers = Every(every=math.ceil(len(spec.layers) / layers.spread))
    if isinstance(layers, Every):
        return spec.layers[(len(spec.layers) - 1) % layers.every :: layers.every]
    if isinstance(layers, Last):
        if layers.last > len(spec.layers):
            raise UserError(f"layers: last {layers.last} is more than the features hold: {list(spec.layers)}")
        return spec.layers[-layers.last :]
    chosen = resolve_layers(layers, spec.depth)
    if missing := sorted(set(chosen) - set(spec.layers)):
        raise UserError(f"layers {missing} are not in the features, which hold {list(spec.layers)}")
    return chosen


def require_divisor(option: str, value: int, width: int, of: str = "the tokens") -> None:
    """Refuse a number of heads, or a similar option, that does not divide a width.

    Raises:
        UserError: it does not.
    """
    if width % value:
        legal = ", ".join(str(number) for number in range(1, min(width, 32) + 1) if width % number == 0)
        raise UserError(f"{option} {value} does not divide the width {width} of {of}; legal: {legal}")


def require_rank(rank: int, width: int, of: str = "a token") -> None:
    """Refuse a rank that is no bottleneck.

    Raises:
        UserError: it is more than four times the width.
    """
    if rank > _WIDEST * width:
        raise UserError(f"rank {rank:,} is more than {_WIDEST} times the width {width:,} of {of}; give a smaller one")


def require_several_tokens(method: str, spec: FeatureSpec) -> None:
    """Refuse features that hold a single token for a method that attends to tokens.

    Raises:
        UserError: they do.
    """
    if spec.layout.num_tokens < 2:
        raise UserError(
            f"{method} chooses among tokens, but the features hold only one: "
            "set store.tokens: all, or take linear_probe"
        )
