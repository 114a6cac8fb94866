"""LoRA: dW = alpha / rank * B A with A (rank, in) and B (out, rank) (Hu et al., arXiv 2106.09685).

`lora_fix` trains B alone and leaves A as it was drawn: a baseline of He et al., arXiv 2203.16329 (LoRA-FA).
As in the reference code, A starts uniform (Kaiming, a = sqrt(5)) and B at zero. Ours: q and v are adapted inside a
fused qkv map, and the `rank` hidden values are scaled instead of the output.
"""

import math
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.byte_dropout import ByteDropout
from adapt.methods.in_backbone.linear_updates import Target, Targets, Update, add_update, frozen_linear
from adapt.methods.in_backbone.target_modules import Vit
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.config import PositiveInt


class LoRAOptions(TunedOptions):
    """Options of `lora` and `lora_fix`; see `inject_lora`."""

    rank: PositiveInt = 4
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="a positive number, or null for the rank, which makes the scale 1"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Targets = ("q", "v")


class LowRankUpdate(Update):
    """dW = scale * up @ down."""

    def __init__(self, linear: nn.Linear, outputs: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        device = linear.weight.device
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.dropout, self.scale = ByteDropout(dropout), scale

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """See `Update.forward`."""
        hidden = F.linear(self.dropout(x), self.down)
        return F.linear(hidden if self.scale == 1 else hidden * self.scale, self.up)

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """See `Update.delta`."""
        return self.up @ self.down * self.scale


def inject_lora(
    vit: Vit,
    rank: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: tuple[Target, ...] = ("q", "v"),
) -> None:
    """Give every target in every block a low-rank update.

    Args:
        rank: width of the bottleneck.
        alpha: the update is scaled by alpha / rank; by default alpha = rank.
        dropout: on the input of the update.
        targets: which linear maps of a block.
    """
    scale = 1.0 if alpha is None else alpha / rank
    for place in (place for target in targets for place in vit.places(target)):
        add_update(place, LowRankUpdate(frozen_linear(place), place.stop - place.start, rank, scale, dropout))


def inject_lora_fix(vit: Vit, **options: Any) -> None:
    """As `inject_lora`, with its options, but the down-projections stay as they were drawn."""
    inject_lora(vit, **options)
    for update in (module for module in vit.module.modules() if isinstance(module, LowRankUpdate)):
        update.down.requires_grad_(False)
