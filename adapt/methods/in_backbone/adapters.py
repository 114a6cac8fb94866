"""Adapters: residual bottlenecks behind the sublayers of frozen blocks.

    z -> z + W_up GELU(W_down z + b) + b'                    d -> h -> d

`adapter` is Houlsby et al., arXiv 1902.00751: one behind the attention and one behind the MLP of every block, each on
the sublayer's output before the residual is added (behind the layer scale, if a block has one): 2dh + h + d parameters
each. `adapter_drop` has them in the last block only, as He et al. (arXiv 2203.16329) use AdapterDrop, Rueckle et al.,
arXiv 2010.11918. Ours: the up-projection starts at zero, and the norms stay frozen (Houlsby et al. train them too).
"""

from collections.abc import Callable, Sequence
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import Sublayer, TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import Layers, PositiveInt
from store.errors import UserError
from store.layout import resolve_layers

Places = Annotated[list[Sublayer], Field(min_length=1)]
# In timm's blocks an adapter goes before the module that drops a sublayer's output; ViViT's blocks drop both outputs by
# one module, and there it goes behind the last map of the sublayer.
_DROP_PATH: dict[Sublayer, str] = {"attention": "drop_path1", "mlp": "drop_path2"}
_LAST_MAP: dict[Sublayer, str] = {"attention": "attention.o_proj", "mlp": "mlp.fc2"}


class AdapterOptions(TunedOptions):
    """Options of `adapter`.

    Args:
        bottleneck: h.
        places: behind which sublayers.
        layers: in which blocks; those before the first need no gradient.
    """

    bottleneck: PositiveInt = 64
    places: Places = Field(["attention", "mlp"], description="attention, mlp or both")
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k}, {spread: n} or {last: n}")


class AdapterDropOptions(AdapterOptions):
    """Options of `adapter_drop`: those of `adapter`, with another default for `layers`."""

    layers: Layers = Field([-1], description="a list such as [10, 11], {every: k}, {last: n} or all")


class Adapter(nn.Module):
    """z + up(GELU(down(z))), which is z until `up` is trained.

    Args:
        down: the map from d to h.
        up: the map from h to d; starts at zero.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, z: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Adapt the output of a sublayer."""
        adapted: Tensor = z + self.up(F.gelu(self.down(z)))
        return adapted


def inject_adapters(vit: TargetViT, options: AdapterOptions) -> None:
    """Put adapters into the chosen blocks.

    Raises:
        UserError: a layer that does not exist; blocks that do not add two residuals.
    """

    def make_adapter() -> Adapter:
        down, up = nn.Linear(vit.dim, options.bottleneck), nn.Linear(options.bottleneck, vit.dim)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        return Adapter(down, up)

    for layer in resolve_layers(options.layers, len(vit.blocks)):
        insert_adapters(vit.blocks[layer], options.places, make_adapter)


def insert_adapters(block: nn.Module, places: Sequence[Sublayer], make_adapter: Callable[[], nn.Module]) -> None:
    """Put an adapter on the output of every chosen sublayer; dropping the sublayer drops its adapter too.

    Raises:
        UserError: the block does not add two residuals.
    """
    modules = dict(block.named_modules())
    for place in (place for place in _DROP_PATH if place in places):
        if _DROP_PATH[place] in modules:
            block.set_submodule(_DROP_PATH[place], nn.Sequential(make_adapter(), modules[_DROP_PATH[place]]))
        elif _LAST_MAP["attention"] in modules:
            block.set_submodule(_LAST_MAP[place], nn.Sequential(modules[_LAST_MAP[place]], make_adapter()))
        else:
            raise UserError(
                f"an adapter goes where a block adds the output of its attention or MLP, and {type(block).__name__} "
                f"has no {_DROP_PATH[place]}; choose another method, or a backbone of sequential blocks (vit_*, "
                "deit_*, eva*, beit*, ViViT)"
            )
