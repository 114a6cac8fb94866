"""Describes the tokens that a method reads, so that methods need not know where their features come from."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from store.layout import TokenLayout

TokensByLayer = dict[int, Float[Tensor, "batch tokens dim"]]


@runtime_checkable
class PreLogits(Protocol):
    """The frozen part of a backbone between its last block and its classifier: final norm and pooling.

    Attributes:
        reads_patches: whether its pooling reads patch tokens.
        unavailable: why the backbone has no pooling; empty if it has one.
    """

    reads_patches: bool
    unavailable: str

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Apply the final norm."""
        ...

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether tokens of this layout include all that `pool` reads."""
        ...

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool normalized tokens as the backbone does."""
        ...

    def normalize_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Apply the norm that some backbones have after their pooling."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Layers, shape and final norm of the tokens that a method reads.

    Args:
        layers: absolute block indices, ascending.
        depth: number of blocks of the backbone.
        dim: width of a token.
        layout: prefix tokens and patch grid.
        pre_logits: the backbone's final norm and pooling.
    """

    layers: tuple[int, ...]
    depth: int
    dim: int
    layout: TokenLayout
    pre_logits: PreLogits
