"""A low-rank update of one layer's tokens: over channels, then over the patches; of videos over space, then time."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.byte_dropout import ByteDropout
from store.layout import TokenLayout


class Mixer(nn.Module):
    """g(x) of LoSA (losa.py): zero until the up-projections move; prefix tokens are mixed over channels only.

    Args:
        dim, layout: width and layout of the tokens.
        rank: of the channel mixing.
        token_rank: of the mixing over the positions of an image or of every frame; 0 for none.
        time_rank: of the mixing over the frames of a video at every position; 0 for none.
        factorised: else a video's patches are mixed as an image's: all of them at once, at `token_rank`.
        dropout: on the hidden units of every bottleneck.
    """

    def __init__(
        self,
        dim: int,
        layout: TokenLayout,
        rank: int,
        token_rank: int,
        time_rank: int,
        factorised: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_prefix = layout.num_prefix_tokens
        self.frames = layout.grid[0] if factorised and layout.is_video else 1
        positions = layout.num_patches // self.frames
        self.dropout = ByteDropout(dropout)
        self.down, self.up = _bottleneck(dim, rank)
        self.token_down = self.token_up = self.time_down = self.time_up = None
        if token_rank and positions > 1:
            self.token_down, self.token_up = _bottleneck(positions, token_rank)
        if time_rank and self.frames > 1:
            self.time_down, self.time_up = _bottleneck(self.frames, time_rank)

    @property
    def ranks(self) -> list[str]:
        """The options whose token mixing takes place: an axis of one token has none."""
        parts = {"token_rank": self.token_down, "time_rank": self.time_down}
        return [name for name, part in parts.items() if part is not None]

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """g(x)."""
        c: Tensor = self.up(self.dropout(F.gelu(self.down(x))))
        if self.frames == 1:
            return _mix(x, c, self.token_down, self.token_up, self.dropout, self.num_prefix)
        if self.num_prefix == 0:
            return self._mix_frames(x, c)
        prefix, patches = c.split_with_sizes([self.num_prefix, c.shape[1] - self.num_prefix], dim=1)
        return torch.cat([prefix, self._mix_frames(x[:, self.num_prefix :], patches)], dim=1)

    def _mix_frames(
        self, x: Float[Tensor, "batch patches dim"], c: Float[Tensor, "batch patches dim"]
    ) -> Float[Tensor, "batch patches dim"]:
        """c, mixed over the positions of every frame, then over the frames at every position."""
        by_frame = (len(x), self.frames, -1, x.shape[2])  # (batch, frames, positions, dim)
        x, g = x.view(by_frame), c.view(by_frame)
        g = _mix(x, g, self.token_down, self.token_up, self.dropout)
        # Frames are rows of positions x dim numbers, so that neither part permutes anything.
        g = _mix(x.flatten(2), g.flatten(2), self.time_down, self.time_up, self.dropout)
        return g.view(c.shape)


def _mix(
    x: Float[Tensor, "*groups tokens dim"],
    c: Float[Tensor, "*groups tokens dim"],
    down: nn.Linear | None,
    up: nn.Linear | None,
    dropout: ByteDropout,
    num_prefix: int = 0,
) -> Float[Tensor, "*groups tokens dim"]:
    """c + up GELU(down (x + c)) over the tokens behind the prefix; c where there is nothing to mix with."""
    if down is None or up is None:
        return c
    # Zero columns and rows stand for the prefix tokens, which spares slicing and joining the long token axis; a batch
    # of one matrix spares the transposed copy that `matmul` would make of the tokens. The sums come first: what they
    # make is dense, so that joining the groups into one axis copies nothing.
    prefix, added = (num_prefix, 0), (x + c).flatten(0, -3)
    weight_down = F.pad(down.weight, prefix).expand(len(added), -1, -1)  # (groups, rank, tokens)
    weight_up = F.pad(up.weight.T, prefix).T.expand(len(added), -1, -1)  # (groups, tokens, rank)
    hidden = dropout(F.gelu(torch.bmm(weight_down, added) + down.bias[:, None]))  # (groups, rank, dim)
    biased = (c + F.pad(up.bias, prefix)[:, None]).flatten(0, -3)
    return torch.baddbmm(biased, weight_up, hidden).view(c.shape)


def _bottleneck(width: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Maps down to `rank` and up again; the second starts at zero."""
    down, up = nn.Linear(width, rank), nn.Linear(rank, width)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return down, up
