"""A vision transformer as a method changes it: its blocks, and the linear maps in them by the names that papers use."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from store.errors import UserError
from store.layout import TokenLayout

# q, k, v and the output projection of the attention, and the two layers of the MLP; a path is (fused or not) one linear
# map, a fused one holds q, k and v in this order.
TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
_FUSED = "attn.qkv"
_PATHS: dict[str, tuple[str, ...]] = {  # timm's, and ViViT's where it has others
    "q": ("attn.q_proj", "attention.q_proj"),
    "k": ("attn.k_proj", "attention.k_proj"),
    "v": ("attn.v_proj", "attention.v_proj"),
    "proj": ("attn.proj", "attention.o_proj"),
    "fc1": ("mlp.fc1", "mlp.w12"),
    "fc2": ("mlp.fc2", "mlp.w3"),
}
Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class TargetModule:
    """A linear map in a block: `parent.name`, of whose outputs rows `start` to `stop` are meant."""

    parent: nn.Module
    name: str
    start: int
    stop: int

    @property
    def linear(self) -> nn.Module:
        """What stands there now: an `nn.Linear`, or what a method has put in its place."""
        return self.parent.get_submodule(self.name)


@dataclass(frozen=True)
class Vit:
    """A backbone that may be changed in place; every parameter of it is frozen to begin with.

    Args:
        module: the model, its blocks in `.blocks` (timm) or `.layers` (ViViT of transformers).
        layout: prefix tokens and patch grid of the tokens that one block sees.
        dim: width of its tokens.
    """

    module: nn.Module
    layout: TokenLayout
    dim: int

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, first to last."""
        module: Any = self.module
        return list(module.blocks if hasattr(module, "blocks") else module.layers)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Sides of a patch in pixels: (height, width), of ViViT (frames, height, width)."""
        module: Any = self.module
        return tuple(module.patch_embed.patch_size if hasattr(module, "patch_embed") else module.config.tubelet_size)

    def places(self, target: str) -> list[TargetModule]:
        """Where a target (one of TARGETS) stands in every block.

        Raises:
            UserError: the backbone has no such map.
        """
        return [find_target_module(block, target) for block in self.blocks]


def find_target_module(block: nn.Module, target: str) -> TargetModule:
    """Where a target stands in a block.

    Raises:
        UserError: the block has no such map, or a fused one in which it is no third.
    """
    modules = dict(block.named_modules())
    if target in ("q", "k", "v") and _FUSED in modules:
        attention = modules["attn"]
        if hasattr(attention, "qkv_bias_separate"):  # EVA, BEiT: else they read the weight past the module
            attention.qkv_bias_separate = True
        third = _third(modules[_FUSED], modules["attn.proj"])
        start = third * ("q", "k", "v").index(target)
        return TargetModule(attention, "qkv", start, start + third)
    for path in _PATHS[target]:
        if path in modules:
            parent, _, name = path.rpartition(".")
            return TargetModule(modules[parent], name, 0, out_features(modules[path]))
    raise UserError(f"this backbone has no {target!r} in its blocks ({type(block).__name__}); choose other targets")


def _third(fused: Any, proj: Any) -> int:
    if fused.out_features != 3 * proj.in_features:
        raise UserError(
            f"the fused q, k and v of this backbone are {fused.out_features} wide, not three times the "
            f"{proj.in_features} of the attention's output (grouped-query attention), so none can be told from the "
            "others; choose a backbone that keeps them apart (timm: qkv_fused=False), or other targets"
        )
    return int(proj.in_features)


def sublayer_name(block: nn.Module, sublayer: Sublayer) -> str:
    """What a block calls its attention or MLP, if it has a module for it."""
    return "attn" if sublayer == "attention" and not hasattr(block, "attention") else sublayer


def out_features(module: nn.Module) -> int:
    """Width of what a linear map, or what stands in its place, gives out."""
    width = module.out_features
    assert isinstance(width, int)
    return width
