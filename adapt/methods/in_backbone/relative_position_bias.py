"""Relative position bias (Swin, arXiv 2103.14030; BEiT, arXiv 2106.08254), a baseline of He et al., arXiv 2203.16329.

    softmax(Q K^T / sqrt(d_h) + B) V            B_ij = table[head, position of j - position of i]

One table (heads, 2 g_h - 1, 2 g_w - 1) a block, zero to begin with; where a block sees a clip, its table is (heads,
2 g_t - 1, 2 g_h - 1, 2 g_w - 1). The logits of prefix tokens get no bias. The backbone's own attention runs as it is,
and takes B as its mask, which keeps the fused kernel.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import Vit, sublayer_name
from store.errors import UserError
from store.layout import TokenLayout

# What is added to the logits: of timm's ViT and EVA, of its BEiT, of ViViT.
_ARGUMENTS = ("attn_mask", "shared_rel_pos_bias", "attention_mask")


class RelativePositionBias(nn.Module):
    """B of one attention.

    `give` is a hook. As a bound method of a module inside the backbone it follows it into a deep copy.

    Args:
        layout: prefix tokens and patch grid, of two or three sides.
        num_heads: of the attention.
        names: what the attention's arguments are called, in order.
        argument: the one of them that is added to the logits.
    """

    def __init__(self, layout: TokenLayout, num_heads: int, names: tuple[str, ...], argument: str) -> None:
        super().__init__()
        self.num_prefix_tokens, self.grid = layout.num_prefix_tokens, layout.grid
        self.names, self.argument = names, argument
        self.table = nn.Parameter(torch.zeros(num_heads, *(2 * side - 1 for side in layout.grid)))

    def forward(self) -> Float[Tensor, "1 heads tokens tokens"]:
        """B for every pair of tokens."""
        # A query in row i meets key rows 0 ... h - 1 at table rows h - 1 - i on: a window of the table. So B is all its
        # windows, last query first, and needs no index, nor the slow gradient of indexing.
        windows: Tensor = self.table
        for axis, side in enumerate(self.grid, start=1):
            windows = windows.unfold(axis, side, 1)
        axes = range(1, 1 + len(self.grid))
        bias = windows.flip(*axes).flatten(1 + len(axes)).flatten(1, len(axes))  # (heads, patches, patches)
        return F.pad(bias, (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))[None]

    def give(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add B to the arguments of the attention, and to the bias that is among them, if any."""
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs  # ViViT's block hands the mask over by position
        bias, given, tokens = self(), kwargs.get(self.argument), kwargs[self.names[0]]
        if tokens.is_cuda and torch.is_grad_enabled() and not tokens.requires_grad:
            # With a gradient for the bias alone, torch's kernel reads what it never wrote (pytorch#148476).
            kwargs |= {self.names[0]: tokens.detach().requires_grad_()}
        return (), kwargs | {self.argument: bias if given is None else bias + given}


def inject_rpb(vit: Vit) -> None:
    """Give every attention a relative position bias.

    Raises:
        UserError: the backbone's attention takes no bias.
    """
    for block in vit.blocks:
        attention, names, argument = _find_argument(block)
        heads = getattr(attention, "num_heads", None) or attention.num_attention_heads  # timm's name or ViViT's
        bias = RelativePositionBias(vit.layout, heads, names, argument)
        attention.add_module("rpb", bias)
        attention.register_forward_pre_hook(bias.give, with_kwargs=True)


def _find_argument(block: nn.Module) -> tuple[Any, tuple[str, ...], str]:
    """A block's attention, the names of its arguments, and the one of them that takes a bias."""
    attention: Any = getattr(block, sublayer_name(block, "attention"), None)
    names = tuple(inspect.signature(attention.forward).parameters) if attention is not None else ()
    for argument in _ARGUMENTS:
        if argument in names:
            return attention, names, argument
    raise UserError(
        f"rpb adds a bias to the logits of the attention, which that of {type(block).__name__} does not take "
        f"({' or '.join(_ARGUMENTS)}); choose another method, or a vit_*, deit_*, eva*, beit* or ViViT backbone"
    )
