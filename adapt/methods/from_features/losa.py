"""LoSA: a low-rank side network beside a frozen backbone (Mercea et al., CVPR 2024, arXiv 2402.02887).

With tokens b_1 ... b_L (tokens, d) of L chosen layers, and y_0 = 0,

    x_i = norm(b_i) + y_{i-1}
    c   = W_up GELU(W_down x_i)                       channels: d -> r -> d
    g   = c + (V_up GELU(V_down (x_i + c)^T))^T       tokens:   N -> s -> N, patches only
    y_i = y_{i-1} + g

and the classifier reads final_norm(b_L + y_L). The t frames of a video, of h x w patches each, are mixed one by one
over space and then, at every position, over time:

    g1  = c  + (V_up GELU(V_down (x_i + c)^T))^T      space:   hw -> s -> hw, in every frame
    g   = g1 + (U_up GELU(U_down (x_i + g1)^T))^T     time:     t -> s' -> t, at every position

The parameters of a layer are, with biases, 2dr + r + d and 2Ns + s + N, or 2hws + s + hw and 2ts' + s' + t.

The paper's: the parallel, iterative refinement of frozen features, mixing of channels and then of tokens at low rank,
factorised for videos (first space, then time), no gradient into the backbone. Ours: norm(b_i) is a LayerNorm without
parameters (massive channels would drown the others), prefix tokens take no part in token mixing, each mixing adds to
what the one before it found, the up-projections start at zero (at step 0 LoSA is the linear probe). The defaults come
from the ablation in docs/ablation.md, on images.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from adapt.methods.from_features.token_mixer import Mixer
from adapt.methods.readout import Pool, Readout
from store.config import Layers, PositiveInt
from store.errors import UserError
from store.layout import resolve_layers
from store.strict_model import StrictModel

Norm = Literal["layer", "backbone", "none"]
Add = Literal["before_norm", "after_norm"]


class LoSAOptions(StrictModel):
    """Options of `losa`; see `LoSA`."""

    rank: PositiveInt = 64
    token_rank: Annotated[int, Field(ge=0)] = 8
    norm: Norm = "layer"
    add: Add = "before_norm"
    pool: Pool = "auto"
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k} or {last: n}")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    time_rank: Annotated[int, Field(ge=0)] = 8
    factorised: bool = True


class LoSA(nn.Module):
    """The side network and its classifier.

    Args:
        spec: layers, width, token layout and frozen tail of the backbone.
        num_classes: width of the classifier.
        rank: r, width of the channel bottleneck.
        token_rank: s, width of the bottleneck of an image's tokens, or of those of every frame; 0 for no such mixing.
        norm: how b_i is normalized: `layer` (LayerNorm without parameters), `backbone` (its final norm), `none`.
        add: whether y_L is added to b_L before the backbone's final norm or after it.
        pool: what the classifier reads; see `adapt.methods.readout.Readout`.
        layers: which of the layers to use, as in `store.layers`.
        dropout: on the hidden units of all bottlenecks.
        time_rank: s', width of the bottleneck of the frames; 0 for no mixing over time. It has no meaning where there
            is one frame, or where `factorised` is false.
        factorised: false mixes all patches of a video at once, at `token_rank`, as if it were one image of t h w
            patches. It has no meaning for images.

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
        time_rank: int = 8,
        factorised: bool = True,
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)  # first, so that every method draws the same head from a seed
        self.layers = choose_layers(layers, spec)
        self.norm, self.add = norm, add
        mixers = [Mixer(spec.dim, spec.layout, rank, token_rank, time_rank, factorised, dropout) for _ in self.layers]
        if (ranks := mixers[0].ranks) and not self.readout.reads_patches:
            raise UserError(
                f"pool {pool!r} reads the class token, which no token mixing reaches (it mixes patches): "
                f"set {' and '.join(f'{name}: 0' for name in ranks)}, or pool: mean or cls_mean"
            )
        self.mixers = nn.ModuleList(mixers)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        y: Tensor | None = None
        for layer, mixer in zip(self.layers, self.mixers, strict=True):
            x = self._normalize(tokens[layer])
            x = x.to(_precision(x))  # once, and not in every product: half the memory that is read and kept
            y = mixer(x) if y is None else y + mixer(x + y)
        assert y is not None
        last = tokens[self.layers[-1]]
        summed = self.readout.normalize(last + y) if self.add == "before_norm" else self.readout.normalize(last) + y
        logits: Tensor = self.readout(summed)
        return logits

    def _normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.norm == "layer":
            return F.layer_norm(tokens, tokens.shape[-1:])
        return self.readout.normalize(tokens) if self.norm == "backbone" else tokens


def _precision(tokens: Float[Tensor, "..."]) -> torch.dtype:
    """What autocast multiplies tokens in, which without it is their own."""
    device = tokens.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else tokens.dtype


def choose_layers(layers: Layers, spec: FeatureSpec) -> tuple[int, ...]:
    """The layers a side network uses: all that are stored, or the ones named, which must be stored."""
    if layers == "all":
        return spec.layers
    chosen = resolve_layers(layers, spec.depth)
    if missing := sorted(set(chosen) - set(spec.layers)):
        raise UserError(f"layers {missing} are not in the features, which hold {list(spec.layers)}")
    return chosen
