"""LoSA: a low-rank side network beside a frozen backbone (Mercea et al., CVPR 2024, arXiv 2402.02887).

With tokens b_1 ... b_L (tokens, d) of L chosen layers, and y_0 = 0,

    x_i = norm(b_i) + y_{i-1}
    c   = W_up GELU(W_down x_i)                       channels: d -> r -> d
    g   = c + (V_up GELU(V_down (x_i + c)^T))^T       tokens:   N -> s -> N, patches only
    y_i = y_{i-1} + g

and the classifier reads final_norm(b_L + y_L). With `start: last` the side network starts from the backbone's last
output instead, as some read the paper: x_i = norm(b_i) + norm(b_L) + y_{i-1}.

The t frames of a video, of h x w patches each, are mixed one by one over space and then, at every position, over time:

    g1  = c  + (V_up GELU(V_down (x_i + c)^T))^T      space:   hw -> s -> hw, in every frame
    g   = g1 + (U_up GELU(U_down (x_i + g1)^T))^T     time:     t -> s' -> t, at every position

The parameters of a layer are, with biases, 2dr + r + d and 2Ns + s + N, or 2hws + s + hw and 2ts' + s' + t.

The paper's: the parallel, iterative refinement of frozen features, mixing of channels and then of tokens at low rank,
factorized for videos (first space, then time), no gradient into the backbone. Ours: norm(b_i) is a LayerNorm without
parameters (massive channels would drown the others), prefix tokens take no part in token mixing, each mixing adds to
the result of the one before it, the up-projections start at zero (at step 0 LoSA is the linear probe). The defaults
come from the ablation in docs/ablation.md, on images.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.dropout import ByteDropout, Draw, draw_bytes
from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer, autocast_dtype
from adapt.methods.options import SIDE_LAYERS_HELP, MethodOptions, SideLayers, choose_layers, require_rank
from adapt.methods.readout import Pooling, Readout
from store.config import PositiveInt
from store.errors import UserError
from store.layout import TokenLayout


class LoSAOptions(MethodOptions):
    """Options of `losa`.

    Args:
        rank: r, width of the channel bottleneck.
        token_rank: s, width of the patch bottleneck; 0 leaves token mixing out.
        start: what the side network starts from: zero, or last, the backbone's last output.
        norm: how a layer's tokens are normalized: layer (without parameters), backbone (its final norm), none.
        add: where the sum of updates joins the last layer: before_norm or after_norm, of the final norm.
        pool: what the head reads; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: auto (at most four, evenly spread), all, a list of blocks, {every: k},
            {spread: n} or {last: n} of those stored.
        dropout: on the hidden units of all bottlenecks.
        time_rank: s', width of the bottleneck of the frames of a video; 0 leaves mixing over time out.
        factorised: videos: first space, then time; false mixes all patches of all frames at once, at `token_rank`.
    """

    rank: PositiveInt = 16
    token_rank: Annotated[int, Field(ge=0)] = 32
    start: Literal["zero", "last"] = "zero"
    norm: Literal["layer", "backbone", "none"] = "layer"
    add: Literal["before_norm", "after_norm"] = "before_norm"
    pool: Pooling = "auto"
    layers: SideLayers = Field("auto", description=SIDE_LAYERS_HELP)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    time_rank: Annotated[int, Field(ge=0)] = 8
    factorised: bool = True


class LoSA(nn.Module):
    """The side network and its classifier.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `LoSAOptions`.

    Raises:
        UserError: a layer that is not in the features; a pool that reads none of the tokens that are mixed.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LoSAOptions = LoSAOptions()) -> None:
        super().__init__()
        self.layers, self.dim = choose_layers(options.layers, spec), spec.dim
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers[-1:])
        self.options, self.norm, self.start, self.add = options, options.norm, options.start, options.add
        mixers = [LowRankMixer(spec.dim, spec.layout, options) for _ in self.layers]
        if (ranks := mixers[0].token_mixing_options) and not self.readout.reads_patches:
            raise UserError(
                f"pool {options.pool!r} reads the class token, which no token mixing reaches (it mixes patches): "
                f"set {' and '.join(f'{name}: 0' for name in ranks)}, or pool: mean or cls_mean"
            )
        self.mixers = nn.ModuleList(mixers)

    def forward(self, tokens: TokensByLayer, draw: Draw = draw_bytes) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}; dropout takes its random bytes from `draw`."""
        batch = self.read(tokens)
        y: Tensor | None = None
        for layer, mixer in zip(self.layers, self.mixers, strict=True):
            x = self.normalized(batch, layer)
            y = mixer(x, draw) if y is None else y + mixer(x + y, draw)
        assert y is not None
        return self.classify(batch, y)

    def read(self, tokens: TokensByLayer) -> TokenBatch:
        """The tokens that the logits depend on: without patches if neither token mixing nor the pooling reads them."""
        batch = TokenBatch.of(tokens)
        return batch if self.readout.reads_patches else batch.prefix(self.readout.layout.num_prefix_tokens)

    def normalized(self, batch: TokenBatch, layer: int) -> Float[Tensor, "batch read dim"]:
        """A layer's tokens x before the updates, computed once for all models of these options."""
        name = "losa", self.norm, self.start, self.readout.tail
        return batch.remember(name, layer, lambda: self._frozen_input(batch, layer))

    def _frozen_input(self, batch: TokenBatch, layer: int) -> Float[Tensor, "batch read dim"]:
        x = self._normalize(batch, layer)
        if self.start == "last":
            x = x + self._normalize(batch, self.layers[-1])
        return x.to(autocast_dtype(x))  # once, not in every product: half the memory that is read and kept

    def _normalize(self, batch: TokenBatch, layer: int) -> Float[Tensor, "batch read dim"]:
        if self.norm == "none":
            return batch[layer]
        return batch.layer_norm(layer) if self.norm == "layer" else batch.normalized(layer, self.readout.tail)

    def classify(self, batch: TokenBatch, y: Float[Tensor, "batch read dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of the sum of updates."""
        return self.readout(self.add_to_last(batch, y))  # type: ignore[no-any-return]

    def add_to_last(
        self, batch: TokenBatch, y: Float[Tensor, "*models batch read dim"]
    ) -> Float[Tensor, "*models batch read dim"]:
        """The last layer's normalized tokens with the sum of updates."""
        layer, tail = self.layers[-1], self.readout.tail
        if self.add == "after_norm":
            return batch.normalized(layer, tail) + y
        summed = batch[layer] + y
        return self.readout.normalize(summed.view(-1, *y.shape[-2:])).view(y.shape)


class LowRankMixer(nn.Module):
    """g(x) for one layer: mixes channels, then patches; of videos over space, then over time.

    It is zero until the up-projections are trained. Prefix tokens are mixed over channels only.

    Args:
        dim: width of the tokens.
        layout: prefix tokens and patch grid.
        options: see `LoSAOptions`; read are `rank`, `token_rank`, `time_rank`, `factorised` and `dropout`.
    """

    def __init__(self, dim: int, layout: TokenLayout, options: LoSAOptions) -> None:
        super().__init__()
        self.num_prefix = layout.num_prefix_tokens
        self.frames = layout.grid[0] if options.factorised and layout.is_video else 1
        positions = layout.num_patches // self.frames
        self.dropout = ByteDropout(options.dropout)
        require_rank(options.rank, dim)
        self.down, self.up = _bottleneck(dim, options.rank)
        self.token_down = self.token_up = self.time_down = self.time_up = None
        if options.token_rank and positions > 1:
            self.token_down, self.token_up = _bottleneck(positions, options.token_rank)
        if options.time_rank and self.frames > 1:
            self.time_down, self.time_up = _bottleneck(self.frames, options.time_rank)

    @property
    def token_mixing_options(self) -> list[str]:
        """The options that switch token mixing on here; along an axis of one token nothing is mixed."""
        maps = {"token_rank": self.token_down, "time_rank": self.time_down}
        return [name for name, down in maps.items() if down is not None]

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], draw: Draw = draw_bytes
    ) -> Float[Tensor, "batch tokens dim"]:
        """g(x)."""
        c: Tensor = self.up(self.dropout(F.gelu(self.down(x)), draw))
        if not self.token_mixing_options:
            return c
        if self.frames == 1:
            return self._mix(x, c, (self.token_down, self.token_up), draw, num_prefix=self.num_prefix)
        if self.num_prefix == 0:
            return self._mix_video(x, c, draw)
        prefix, patches = c.split_with_sizes([self.num_prefix, c.shape[1] - self.num_prefix], dim=1)
        return torch.cat([prefix, self._mix_video(x[:, self.num_prefix :], patches, draw)], dim=1)

    def _mix_video(
        self, x: Float[Tensor, "batch patches dim"], c: Float[Tensor, "batch patches dim"], draw: Draw
    ) -> Float[Tensor, "batch patches dim"]:
        """Mix c over the positions of every frame, then over the frames at every position."""
        by_frame = (len(x), self.frames, -1, x.shape[2])  # (batch, frames, positions, dim)
        x, g = x.view(by_frame), c.view(by_frame)
        g = self._mix(x, g, (self.token_down, self.token_up), draw)
        # Frames are rows of positions x dim numbers, so that neither part permutes anything.
        g = self._mix(x.flatten(2), g.flatten(2), (self.time_down, self.time_up), draw)
        return g.view(c.shape)

    def _mix(
        self,
        x: Float[Tensor, "*groups tokens dim"],
        c: Float[Tensor, "*groups tokens dim"],
        maps: tuple[nn.Linear | None, nn.Linear | None],
        draw: Draw,
        num_prefix: int = 0,
    ) -> Float[Tensor, "*groups tokens dim"]:
        """Compute c + up GELU(down (x + c)) over the tokens behind the prefix; c if there are no such maps."""
        down, up = maps
        if down is None or up is None:
            return c
        # Zero columns and rows for the prefix tokens spare slicing and joining the long token axis; a batch of one
        # matrix spares the transposed copy that `matmul` would make of the tokens. The sums come first: their results
        # are dense, so that joining the groups into one axis copies nothing.
        prefix, added = (num_prefix, 0), (x + c).flatten(0, -3)
        weight_down = F.pad(down.weight, prefix).expand(len(added), -1, -1)  # (groups, rank, tokens)
        weight_up = F.pad(up.weight.T, prefix).T.expand(len(added), -1, -1)  # (groups, tokens, rank)
        hidden = self.dropout(F.gelu(torch.bmm(weight_down, added) + down.bias[:, None]), draw)  # (groups, rank, dim)
        biased = (c + F.pad(up.bias, prefix)[:, None]).flatten(0, -3)
        return torch.baddbmm(biased, weight_up, hidden).view(c.shape)


def _bottleneck(width: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Maps down to `rank` and up again; the second starts at zero."""
    down, up = nn.Linear(width, rank), nn.Linear(rank, width)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return down, up
