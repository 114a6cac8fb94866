"""Relative position bias (Swin, arXiv 2103.14030; BEiT, arXiv 2106.08254), a baseline of He et al., arXiv 2203.16329.

    softmax(Q K^T / sqrt(d_h) + B) V            B_ij = table[head, position of j - position of i]

The parameters are one table a block, (heads, 2 g_h - 1, 2 g_w - 1) or, in a block that sees a clip, (heads, 2 g_t - 1,
2 g_h - 1, 2 g_w - 1), which starts at zero. The logits of prefix tokens get no bias. The backbone's own attention runs
unchanged and takes B as its mask, which keeps the fused kernel.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import TargetViT, sublayer_name
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.errors import UserError
from store.layout import TokenLayout

# The argument that an attention adds to its logits: in timm's ViT and EVA, in its BEiT, in ViViT.
_BIAS_ARGUMENTS = ("attn_mask", "shared_rel_pos_bias", "attention_mask")


class RelativePositionBias(nn.Module):
    """B of one attention.

    `add_to_arguments` is a hook; as a bound method of a module in the backbone it is copied with it by `deepcopy`.

    Args:
        layout: prefix tokens and patch grid, of two or three axes.
        num_heads: of the attention.
        names: the attention's parameters, in order.
        argument: the one of them that is added to the logits.
    """

    def __init__(self, layout: TokenLayout, num_heads: int, names: tuple[str, ...], argument: str) -> None:
        super().__init__()
        self.num_prefix_tokens, self.grid = layout.num_prefix_tokens, layout.grid
        self.names, self.argument = names, argument
        self.table = nn.Parameter(torch.zeros(num_heads, *(2 * side - 1 for side in layout.grid)))

    def forward(self) -> Float[Tensor, "1 heads tokens tokens"]:
        """B for every pair of tokens."""
        # The query in row i reads table rows h - 1 - i to 2h - 2 - i: a window of the table. B is all windows, the last
        # query's first; this needs no index, nor the slow gradient of indexing.
        windows: Tensor = self.table
        for axis, side in enumerate(self.grid, start=1):
            windows = windows.unfold(axis, side, 1)
        axes = range(1, 1 + len(self.grid))
        bias = windows.flip(*axes).flatten(1 + len(axes)).flatten(1, len(axes))  # (heads, patches, patches)
        return F.pad(bias, (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))[None]

    def add_to_arguments(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add B to the arguments of the attention, on top of a bias that is among them already."""
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs  # ViViT's block passes the mask by position
        bias, other_bias, tokens = self(), kwargs.get(self.argument), kwargs[self.names[0]]
        if tokens.is_cuda and torch.is_grad_enabled() and not tokens.requires_grad:
            # With a gradient for the bias alone, torch's kernel reads uninitialized memory (pytorch#148476).
            kwargs |= {self.names[0]: tokens.detach().requires_grad_()}
        return (), kwargs | {self.argument: bias if other_bias is None else bias + other_bias}


def inject_rpb(vit: TargetViT, options: TunedOptions) -> None:
    """Give every attention a relative position bias.

    Raises:
        UserError: the backbone's attention takes no bias.
    """
    for block in vit.blocks:
        attention, names, argument = _find_argument(block)
        heads = getattr(attention, "num_heads", None) or attention.num_attention_heads  # timm's name or ViViT's
        bias = RelativePositionBias(vit.layout, heads, names, argument)
        attention.add_module("rpb", bias)
        attention.register_forward_pre_hook(bias.add_to_arguments, with_kwargs=True)


def _find_argument(block: nn.Module) -> tuple[Any, tuple[str, ...], str]:
    """A block's attention, the names of its arguments, and the one of them that takes a bias."""
    attention: Any = getattr(block, sublayer_name(block, "attention"), None)
    names = tuple(inspect.signature(attention.forward).parameters) if attention is not None else ()
    for argument in _BIAS_ARGUMENTS:
        if argument in names:
            return attention, names, argument
    raise UserError(
        f"rpb adds a bias to the logits of the attention, which that of {type(block).__name__} does not take "
        f"({' or '.join(_BIAS_ARGUMENTS)}); choose another method, or a vit_*, deit_*, eva*, beit* or ViViT backbone"
    )
