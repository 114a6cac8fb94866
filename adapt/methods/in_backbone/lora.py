"""LoRA: dW = alpha / rank * B A with A (rank, in) and B (out, rank) (Hu et al., arXiv 2106.09685).

    y = W x + b + alpha / rank * B A x

For q and v of L blocks d wide these are 4Ldr parameters.
`lora_fix` trains B alone, half of them, and leaves A as it was drawn: a baseline of He et al., arXiv 2203.16329
(LoRA-FA). As in the reference code, A starts uniform (Kaiming, a = sqrt(5)) and B at zero. Ours: q and v are adapted
inside a fused qkv map, and the `rank` hidden values are scaled instead of the output.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.dropout import ByteDropout
from adapt.methods.in_backbone.target_modules import TargetModule, Targets, TargetViT
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from adapt.methods.in_backbone.updated_linear import WeightUpdate, add_update, frozen_linear
from adapt.methods.options import require_rank
from store.config import PositiveInt


class LoRAOptions(TunedOptions):
    """Options of `lora` and `lora_fix`.

    Args:
        rank: r.
        alpha: the update is scaled by alpha / rank; null: scale 1.
        dropout: on the input of the update.
        targets: among q, k, v, proj, fc1, fc2.
    """

    rank: PositiveInt = 4
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="a positive number, or null for the rank, which makes the scale 1"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Targets = ("q", "v")


class LowRankUpdate(WeightUpdate):
    """dW = scale * up @ down.

    Args:
        target: the linear map, which gives the shapes.
        options: see `LoRAOptions`.
    """

    def __init__(self, target: TargetModule, options: LoRAOptions) -> None:
        super().__init__()
        linear = frozen_linear(target)
        device = linear.weight.device
        require_rank(options.rank, min(linear.in_features, target.out_features), of="a linear map")
        self.down = nn.Parameter(torch.empty(options.rank, linear.in_features, device=device))  # A
        self.up = nn.Parameter(torch.zeros(target.out_features, options.rank, device=device))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.dropout = ByteDropout(options.dropout)
        self.scale = 1.0 if options.alpha is None else options.alpha / options.rank

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """See `WeightUpdate.forward`."""
        hidden = self.scale * F.linear(self.dropout(x), self.down)
        return F.linear(hidden, self.up)

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """See `WeightUpdate.delta`."""
        return self.up @ self.down * self.scale


def inject_lora(vit: TargetViT, options: LoRAOptions) -> None:
    """Add a low-rank update to every target of every block."""
    for name in options.targets:
        for target in vit.target_modules(name):
            add_update(target, LowRankUpdate(target, options))


def inject_lora_fix(vit: TargetViT, options: LoRAOptions) -> None:
    """As `inject_lora`, but the down-projections stay as they were drawn."""
    inject_lora(vit, options)
    for module in vit.module.modules():
        if isinstance(module, LowRankUpdate):
            module.down.requires_grad_(False)
