"""LePE: locally enhanced positional encoding (Dong et al., arXiv 2107.00652), a baseline in He et al., 2203.16329.

    attention(x) = W_o (softmax(Q K^T / sqrt(d_h)) V + conv(V)) + b_o

conv is a depthwise 3 x 3 convolution, with a bias, of V on the patch grid. Ours: prefix tokens neither enter it nor
get anything from it; it starts at zero; where an attention normalises its output before W_o, conv(V) is added before
the norm.

timm's own attention runs as it is, fused kernel included: V is read where its projection gives it out, and conv(V)
added where the sum is next read.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.tuning.vit import Place, Vit, find_place
from store.errors import UserError
from store.layout import TokenLayout


class LocalEncoding(nn.Module):
    """conv(V) of one attention.

    `keep` and `add` are hooks. As bound methods of a module inside the backbone they follow it into a deep copy.
    """

    def __init__(self, layout: TokenLayout, start: int, stop: int) -> None:
        super().__init__()
        self.num_prefix_tokens, self.grid = layout.num_prefix_tokens, layout.grid
        self.start, self.stop = start, stop
        self.conv = nn.Conv2d(stop - start, stop - start, 3, padding=1, groups=stop - start)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self._kept: Tensor | None = None  # from `keep` to `add`, within one forward pass of the attention

    def forward(self, v: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """conv(V) of patches, zero of prefix tokens."""
        image = v[:, self.num_prefix_tokens :].reshape(len(v), *self.grid, -1).permute(0, 3, 1, 2)
        local = self.conv(image.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        return F.pad(local, (0, 0, self.num_prefix_tokens, 0))

    def keep(self, linear: nn.Module, args: Any, output: Float[Tensor, "batch tokens qkv"]) -> None:
        """Note what the projection gave out: whole, as EVA and BEiT add the bias of V to it in place, afterwards."""
        self._kept = output

    def add(self, reader: nn.Module, args: tuple[Float[Tensor, "batch tokens dim"]]) -> tuple[Tensor]:
        """Add conv(V) to what is read next, and forget V."""
        assert self._kept is not None
        v, self._kept = self._kept[..., self.start : self.stop], None
        return (args[0] + self(v),)


def install_lepe(vit: Vit) -> None:
    """Add conv(V) to the output of every attention.

    Raises:
        UserError: the backbone has no V in its blocks, or fewer heads in V than in Q.
    """
    for block in vit.blocks:
        _install(find_place(block, "v"), find_place(block, "proj").linear, vit.layout)


def _install(v: Place, proj: nn.Module, layout: TokenLayout) -> None:
    width = proj.in_features
    if v.stop - v.start != width:
        raise UserError(
            f"lepe adds to the attention's output, {width} wide, a convolution of V, which is {v.stop - v.start} wide "
            "here (grouped-query attention); choose another method, or a backbone with as many heads in V as in Q"
        )
    encoding = LocalEncoding(layout, v.start, v.stop)
    v.parent.add_module("lepe", encoding)
    v.linear.register_forward_hook(encoding.keep)
    getattr(v.parent, "norm", proj).register_forward_pre_hook(encoding.add)
