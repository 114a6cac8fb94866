"""What a feature-trained method must know of the tokens it gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from store.layout import TokenLayout

TokensByLayer = dict[int, Float[Tensor, "batch tokens dim"]]


@runtime_checkable
class Tail(Protocol):
    """The backbone's frozen read-out; `extract.backbones.pre_logits.PreLogits` is one.

    `unavailable` says why the backbone does not pool, where it does not; `reads_patches`, whether it pools patches.
    """

    reads_patches: bool
    unavailable: str

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Final norm."""
        ...

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether tokens of that layout hold what `pool` reads."""
        ...

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pooling of normalized tokens, as the backbone does it."""
        ...

    def normalize_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The norm that some backbones have behind their pooling."""
        ...


@runtime_checkable
class TrainableBackbone(Protocol):
    """A frozen backbone of which methods may train a copy: `extract.backbones.backbone.ModelBackbone` lists them.

    `block_layout` is that of the tokens as one block sees them: of one frame, where frames run by themselves.
    """

    module: nn.Module
    layout: TokenLayout
    block_layout: TokenLayout
    tail: Any

    def trainable_copy(self, depth: int) -> "TrainableBackbone":
        """The first `depth` blocks in a module of their own; the tail's norm is that module's."""
        ...

    def tokens(self, images: Float[Tensor, "batch ..."], layers: Sequence[int]) -> TokensByLayer:
        """Block outputs of the chosen layers."""
        ...


@dataclass(frozen=True)
class FeatureSpec:
    """Layers (absolute block indices, ascending) of `dim` wide tokens, laid out as `layout`; `depth` blocks in all."""

    layers: tuple[int, ...]
    depth: int
    dim: int
    layout: TokenLayout
    tail: Tail
