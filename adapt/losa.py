"""LoSA: a low-rank side network beside a frozen backbone (Mercea et al., CVPR 2024, arXiv 2402.02887).

With tokens b_1 ... b_L (tokens, d) of L chosen layers, and y_0 = 0,

    x_i = norm(b_i) + y_{i-1}
    c   = W_up GELU(W_down x_i)                       channels: d -> r -> d
    g   = c + (V_up GELU(V_down (x_i + c)^T))^T       tokens:   N -> s -> N, patches only
    y_i = y_{i-1} + g

and the classifier reads final_norm(b_L + y_L).

The paper's: the parallel, iterative refinement of frozen features, mixing of channels and then of tokens at low rank,
no gradient into the backbone. Ours: norm(b_i) is a LayerNorm without parameters (massive channels would drown the
others), prefix tokens take no part in token mixing, the up-projections start at zero (at step 0 LoSA is the linear
probe). The defaults come from the ablation in docs/ablation.md.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.dropout import ByteDropout
from adapt.readout import Pool, Readout
from adapt.spec import FeatureSpec, TokensByLayer
from store.config import Layers, PositiveInt, Section
from store.errors import UserError
from store.layout import resolve_layers

Norm = Literal["layer", "backbone", "none"]
Add = Literal["before_norm", "after_norm"]


class LoSAOptions(Section):
    """Options of `losa`; see `LoSA`."""

    rank: PositiveInt = 64
    token_rank: Annotated[int, Field(ge=0)] = 8
    norm: Norm = "layer"
    add: Add = "before_norm"
    pool: Pool = "auto"
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k} or {last: n}")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Mixer(nn.Module):
    """One layer's low-rank update g(x): channels, then patch tokens (`token_rank` 0 leaves the tokens out)."""

    def __init__(self, dim: int, num_prefix: int, num_patches: int, rank: int, token_rank: int, dropout: float) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.dropout = ByteDropout(dropout)
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)
        _zero(self.up)
        self.token_down = self.token_up = None
        if token_rank and num_patches > 1:
            self.token_down, self.token_up = nn.Linear(num_patches, token_rank), nn.Linear(token_rank, num_patches)
            _zero(self.token_up)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """g(x), which is zero until the up-projections move."""
        c: Tensor = self.up(self.dropout(F.gelu(self.down(x))))
        if self.token_down is None or self.token_up is None:
            return c
        # Zero columns and rows stand for the prefix tokens, which spares slicing and joining the long token axis; a
        # batch of one matrix spares the transposed copy that `matmul` would make of the tokens.
        prefix, batch = (self.num_prefix, 0), len(x)
        down = F.pad(self.token_down.weight, prefix).expand(batch, -1, -1)  # (batch, s, tokens)
        up = F.pad(self.token_up.weight.T, prefix).T.expand(batch, -1, -1)  # (batch, tokens, s)
        hidden = self.dropout(F.gelu(torch.bmm(down, x + c) + self.token_down.bias[:, None]))  # (batch, s, dim)
        return torch.baddbmm(c + F.pad(self.token_up.bias, prefix)[:, None], up, hidden)


class LoSA(nn.Module):
    """The side network and its classifier.

    Args:
        spec: layers, width, token layout and frozen tail of the backbone.
        num_classes: width of the classifier.
        rank: r, width of the channel bottleneck.
        token_rank: s, width of the token bottleneck; 0 for LoSA without token mixing.
        norm: how b_i is normalised: `layer` (LayerNorm without parameters), `backbone` (its final norm), `none`.
        add: whether y_L is added to b_L before the backbone's final norm or after it.
        pool: what the classifier reads; see `adapt.readout.Readout`.
        layers: which of the layers to use, as in `store.layers`.
        dropout: on the hidden units of both bottlenecks.

    Raises:
        UserError: a layer that is not in the features; a pool that reads none of the tokens that are mixed.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        num_classes: int,
        rank: int = 64,
        token_rank: int = 8,
        norm: Norm = "layer",
        add: Add = "before_norm",
        pool: Pool = "auto",
        layers: Layers = "all",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)  # first, so that every method draws the same head from a seed
        self.layers = choose_layers(layers, spec)
        self.norm, self.add = norm, add
        layout = spec.layout
        if token_rank and layout.num_patches > 1 and not self.readout.reads_patches:
            raise UserError(
                f"pool {pool!r} reads the class token, which no token mixing reaches (it mixes patches): "
                "set token_rank: 0, or pool: mean or cls_mean"
            )
        self.mixers = nn.ModuleList(
            Mixer(spec.dim, layout.num_prefix_tokens, layout.num_patches, rank, token_rank, dropout)
            for _ in self.layers
        )

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        y: Tensor | None = None
        for layer, mixer in zip(self.layers, self.mixers, strict=True):
            x = self._normalise(tokens[layer])
            y = mixer(x) if y is None else y + mixer(x + y)
        assert y is not None
        last = tokens[self.layers[-1]]
        summed = self.readout.normalise(last + y) if self.add == "before_norm" else self.readout.normalise(last) + y
        logits: Tensor = self.readout(summed)
        return logits

    def _normalise(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.norm == "layer":
            return F.layer_norm(tokens, tokens.shape[-1:])
        return self.readout.normalise(tokens) if self.norm == "backbone" else tokens


def choose_layers(layers: Layers, spec: FeatureSpec) -> tuple[int, ...]:
    """The layers a side network uses: all that are stored, or the ones named, which must be stored."""
    if layers == "all":
        return spec.layers
    chosen = resolve_layers(layers, spec.depth)
    if missing := sorted(set(chosen) - set(spec.layers)):
        raise UserError(f"layers {missing} are not in the features, which hold {list(spec.layers)}")
    return chosen


def _zero(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
