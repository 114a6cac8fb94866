"""Finds the parts of a vision transformer that methods change: its blocks, and the linear maps q, k, v, ... in them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field
from torch import nn

from store.errors import UserError
from store.layout import TokenLayout

# q, k, v and the output projection of the attention, and the two layers of the MLP.
Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
TARGETS: tuple[Target, ...] = get_args(Target)
LEGAL_TARGETS = f"a list of {', '.join(TARGETS)}, each of them once"
Sublayer = Literal["attention", "mlp"]

_FUSED = "attn.qkv"  # one linear map, whose outputs are q, k and v in this order
_PATHS: dict[str, tuple[str, ...]] = {  # in blocks of timm, and in those of ViViT
    "q": ("attn.q_proj", "attention.q_proj"),
    "k": ("attn.k_proj", "attention.k_proj"),
    "v": ("attn.v_proj", "attention.v_proj"),
    "proj": ("attn.proj", "attention.o_proj"),
    "fc1": ("mlp.fc1", "mlp.w12"),
    "fc2": ("mlp.fc2", "mlp.w3"),
}


def _each_once(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    if len(set(targets)) < len(targets):
        raise ValueError("a target is given twice")
    return targets


Targets = Annotated[
    tuple[Target, ...],
    Field(min_length=1, strict=False, description=LEGAL_TARGETS),
    AfterValidator(_each_once),
]


@dataclass(frozen=True, kw_only=True)
class TargetModule:
    """A linear map of a block, or one third of a fused qkv map.

    Args:
        parent: the module that holds the map.
        name: of the map in its parent.
        start: the first output row of the map that belongs to the target.
        stop: the row after the last one.
    """

    parent: nn.Module
    name: str
    start: int
    stop: int

    @property
    def module(self) -> nn.Module:
        """The module at this place now: an `nn.Linear`, or what a method has put there instead."""
        return self.parent.get_submodule(self.name)

    @property
    def out_features(self) -> int:
        """Number of output rows that belong to the target."""
        return self.stop - self.start


@dataclass(frozen=True)
class TargetViT:
    """A copy of a backbone that a method changes in place; all its parameters are frozen at first.

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

    def target_modules(self, target: Target) -> list[TargetModule]:
        """Find a target in every block.

        Raises:
            UserError: a block has no such map.
        """
        return [find_target_module(block, target) for block in self.blocks]


def find_target_module(block: nn.Module, target: Target) -> TargetModule:
    """Find a target in one block.

    Raises:
        UserError: the block has no such map, or a fused one of which it is not a third.
    """
    modules: dict[str, Any] = dict(block.named_modules())
    if target in ("q", "k", "v") and _FUSED in modules:
        attention = modules["attn"]
        if hasattr(attention, "qkv_bias_separate"):
            attention.qkv_bias_separate = True  # else EVA and BEiT multiply by `qkv.weight`, without calling the module
        third = _third(modules[_FUSED], modules["attn.proj"])
        start = third * ("q", "k", "v").index(target)
        return TargetModule(parent=attention, name="qkv", start=start, stop=start + third)
    for path in _PATHS[target]:
        if path in modules:
            parent, _, name = path.rpartition(".")
            return TargetModule(parent=modules[parent], name=name, start=0, stop=modules[path].out_features)
    raise UserError(f"this backbone has no {target!r} in its blocks ({type(block).__name__}); choose other targets")


def _third(fused: Any, proj: Any) -> int:
    """Width of q, k and v each."""
    if fused.out_features != 3 * proj.in_features:
        raise UserError(
            f"the fused q, k and v of this backbone are {fused.out_features} wide, not three times the "
            f"{proj.in_features} of the attention's output (grouped-query attention), so they cannot be separated; "
            "choose a backbone with separate projections (timm: qkv_fused=False), or other targets"
        )
    return int(proj.in_features)


def sublayer_name(block: nn.Module, sublayer: Sublayer) -> str:
    """The attribute under which a block of this kind holds its attention or its MLP."""
    return "attn" if sublayer == "attention" and not hasattr(block, "attention") else sublayer
