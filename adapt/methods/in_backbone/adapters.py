"""Adapters: bottlenecks with a residual of their own, behind the sublayers of frozen blocks.

    z -> z + W_up GELU(W_down z + b) + b'                    d -> h -> d

`adapter` is Houlsby et al., arXiv 1902.00751: one behind the attention and one behind the MLP of every block, each on
the sublayer's output before the residual is added (behind the layer scale, where a block has one). `adapter_drop` has
them in the last block only, as He et al. (arXiv 2203.16329) use AdapterDrop, Rueckle et al., arXiv 2010.11918. Ours:
the up-projection starts at zero, and the norms stay frozen (Houlsby et al. train them too).
"""

from collections.abc import Callable, Sequence
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import Sublayer, Vit
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import Layers, PositiveInt
from store.errors import UserError
from store.layout import resolve_layers

Places = Annotated[list[Sublayer], Field(min_length=1)]
# An adapter stands before what drops a sublayer's output in timm's blocks, and behind the last map of it in ViViT's,
# which drop both outputs by one module.
_DROP: dict[Sublayer, str] = {"attention": "drop_path1", "mlp": "drop_path2"}
_MAP: dict[Sublayer, str] = {"attention": "attention.o_proj", "mlp": "mlp.fc2"}


class AdapterOptions(TunedOptions):
    """Options of `adapter`; see `inject_adapters`."""

    bottleneck: PositiveInt = 64
    places: Places = Field(["attention", "mlp"], description="attention, mlp or both")
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k} or {last: n}")


class AdapterDropOptions(AdapterOptions):
    """Options of `adapter_drop`; see `inject_adapters`."""

    layers: Layers = Field([-1], description="a list such as [10, 11], {every: k}, {last: n} or all")


class Adapter(nn.Module):
    """z + up(GELU(down(z)))."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, z: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The sublayer's output, adapted; as it was until `up` moves."""
        adapted: Tensor = z + self.up(F.gelu(self.down(z)))
        return adapted


def inject_adapters(
    vit: Vit,
    bottleneck: int = 64,
    places: Sequence[Sublayer] = ("attention", "mlp"),
    layers: Layers = "all",
) -> None:
    """Put adapters into the blocks.

    Args:
        vit: the frozen backbone.
        bottleneck: h, width of an adapter.
        places: behind which sublayers.
        layers: in which blocks, as in `store.layers`; those before the first of them need no gradient.

    Raises:
        UserError: a layer that is not there; blocks that do not add two residuals.
    """

    def make() -> Adapter:
        down, up = nn.Linear(vit.dim, bottleneck), nn.Linear(bottleneck, vit.dim)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        return Adapter(down, up)

    for layer in resolve_layers(layers, len(vit.blocks)):
        insert_adapters(vit.blocks[layer], places, make)


def insert_adapters(block: nn.Module, places: Sequence[Sublayer], make: Callable[[], Adapter]) -> None:
    """Put an adapter on the output of every chosen sublayer: what drops that drops its adapter too."""
    modules = dict(block.named_modules())
    for place in (place for place in _DROP if place in places):
        if _DROP[place] in modules:
            block.set_submodule(_DROP[place], nn.Sequential(make(), modules[_DROP[place]]))
        elif _MAP["attention"] in modules:
            block.set_submodule(_MAP[place], nn.Sequential(modules[_MAP[place]], make()))
        else:
            raise UserError(
                f"an adapter goes where a block adds the output of its attention or MLP, and {type(block).__name__} "
                f"has no {_DROP[place]}; choose another method, or a backbone of sequential blocks (vit_*, deit_*, "
                "eva*, beit*, ViViT)"
            )
