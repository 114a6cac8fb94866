"""A vision transformer as a method changes it: its blocks, and the linear maps in them by the names that papers use."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from store.errors import UserError
from store.layout import TokenLayout

# q, k, v and the output projection of the attention, and the two layers of the MLP; a path is (fused or not) one linear
# map, a fused one holds q, k and v in this order.
TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
_FUSED = "attn.qkv"
_PATHS: dict[str, tuple[str, ...]] = {
    "q": ("attn.q_proj", "attention.attention.query"),
    "k": ("attn.k_proj", "attention.attention.key"),
    "v": ("attn.v_proj", "attention.attention.value"),
    "proj": ("attn.proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "mlp.w12", "intermediate.dense"),
    "fc2": ("mlp.fc2", "mlp.w3", "output.dense"),
}


@dataclass(frozen=True)
class Place:
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
        module: the model, its blocks in `.blocks` (timm) or `.encoder.layer` (transformers).
        layout: prefix tokens and patch grid of its tokens.
        dim: width of its tokens.
    """

    module: nn.Module
    layout: TokenLayout
    dim: int

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, first to last."""
        found = getattr(self.module, "blocks", None)
        return list(self.module.get_submodule("encoder.layer").children() if found is None else found)

    def places(self, target: str) -> list[Place]:
        """Where a target (one of TARGETS) stands in every block.

        Raises:
            UserError: the backbone has no such map.
        """
        return [find_place(block, target) for block in self.blocks]


def find_place(block: nn.Module, target: str) -> Place:
    """Where a target stands in a block."""
    modules = dict(block.named_modules())
    if target in ("q", "k", "v") and _FUSED in modules:
        attention = modules["attn"]
        if hasattr(attention, "qkv_bias_separate"):  # EVA, BEiT: else they read the weight past the module
            attention.qkv_bias_separate = True
        third = out_features(modules[_FUSED]) // 3
        start = third * ("q", "k", "v").index(target)
        return Place(attention, "qkv", start, start + third)
    for path in _PATHS[target]:
        if path in modules:
            parent, _, name = path.rpartition(".")
            return Place(modules[parent], name, 0, out_features(modules[path]))
    raise UserError(f"this backbone has no {target!r} in its blocks ({type(block).__name__}); choose other targets")


def out_features(module: nn.Module) -> int:
    """Width of what a linear map, or what stands in its place, gives out."""
    width = module.out_features
    assert isinstance(width, int)
    return width
