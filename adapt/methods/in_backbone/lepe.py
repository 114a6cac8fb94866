"""LePE: locally enhanced positional encoding (Dong et al., arXiv 2107.00652), a baseline in He et al., 2203.16329.

    attention(x) = W_o (softmax(Q K^T / sqrt(d_h)) V + conv(V)) + b_o

conv is a depthwise 3 x 3 convolution, with a bias, of V on the patch grid: 10d parameters a block. Ours: in a block
that sees a clip it is 3 x 3 x 3, on the grid of time, height and width, with 28d; it neither reads nor changes prefix
tokens; it starts at zero; in an attention that normalizes its output before W_o, conv(V) is added before the norm.

The backbone's own attention runs unchanged, fused kernel included. Two hooks do the rest: one keeps the output of the
projection of V, the other adds conv(V) to the input of W_o (or of the norm before it).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.in_backbone.target_modules import TargetModule, TargetViT, find_target_module
from adapt.methods.in_backbone.tuned_backbone import TunedOptions
from store.errors import UserError
from store.layout import TokenLayout


class ClipConvolution(nn.Conv3d):
    """A depthwise 3 x 3 x 3 convolution, computed as three 3 x 3 ones.

    `nn.Conv3d` takes several times as long, above all in the backward pass.
    """

    def forward(
        self, clips: Float[Tensor, "batch dim time height width"]
    ) -> Float[Tensor, "batch dim time height width"]:
        """Sum what every frame contributes to itself, to the next and to the previous frame."""
        frames = clips.transpose(1, 2)
        before, local, after = (
            F.conv2d(frames.flatten(0, 1), weight, bias, padding=1, groups=self.groups).view_as(frames)
            for weight, bias in zip(self.weight.unbind(2), (None, self.bias, None), strict=True)
        )
        local[:, 1:] += before[:, :-1]
        local[:, :-1] += after[:, 1:]
        return local.transpose(1, 2)


# Convolution and memory format, by the number of axes of the grid.
_CONVOLUTIONS = {2: (nn.Conv2d, torch.channels_last), 3: (ClipConvolution, torch.channels_last_3d)}


class LocalEncoding(nn.Module):
    """conv(V) of one attention.

    `keep` and `add` are hooks; as bound methods of a module in the backbone they are copied with it by `deepcopy`.

    Args:
        layout: prefix tokens and patch grid.
        start: where V begins in the output of its projection.
        stop: where V ends.
    """

    def __init__(self, layout: TokenLayout, start: int, stop: int) -> None:
        super().__init__()
        self.num_prefix_tokens, self.grid = layout.num_prefix_tokens, layout.grid
        self.start, self.stop = start, stop
        convolution, self._format = _CONVOLUTIONS[len(layout.grid)]
        self.conv = convolution(stop - start, stop - start, 3, padding=1, groups=stop - start)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self._kept: Tensor | None = None  # from `keep` to `add`, within one forward pass of the attention

    def forward(self, v: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """conv(V) for patches, zero for prefix tokens."""
        image = v[:, self.num_prefix_tokens :].reshape(len(v), *self.grid, -1).movedim(-1, 1)
        local = self.conv(image.contiguous(memory_format=self._format)).flatten(2).transpose(1, 2)
        return F.pad(local, (0, 0, self.num_prefix_tokens, 0))

    def keep(self, linear: nn.Module, args: Any, output: Float[Tensor, "batch tokens qkv"]) -> None:
        """Keep the whole output of the projection: EVA and BEiT add the bias of V to it in place, afterwards."""
        self._kept = output

    def add(self, reader: nn.Module, args: tuple[Float[Tensor, "batch tokens dim"]]) -> tuple[Tensor]:
        """Add conv(V) to the input of `reader`, and release V."""
        assert self._kept is not None
        v, self._kept = self._kept[..., self.start : self.stop], None
        return (args[0] + self(v),)


def inject_lepe(vit: TargetViT, options: TunedOptions) -> None:
    """Add conv(V) to the output of every attention.

    Raises:
        UserError: the backbone has no V in its blocks, or fewer heads in V than in Q.
    """
    for block in vit.blocks:
        _add_encoding(find_target_module(block, "v"), find_target_module(block, "proj").module, vit.layout)


def _add_encoding(v: TargetModule, proj: Any, layout: TokenLayout) -> None:
    if v.out_features != proj.in_features:
        raise UserError(
            f"lepe adds to the attention's output, {proj.in_features} wide, a convolution of V, which is "
            f"{v.out_features} wide here (grouped-query attention); choose another method, or a backbone with as many "
            "heads in V as in Q"
        )
    encoding = LocalEncoding(layout, v.start, v.stop)
    v.parent.add_module("lepe", encoding)
    v.module.register_forward_hook(encoding.keep)
    getattr(v.parent, "norm", proj).register_forward_pre_hook(encoding.add)
