"""Attentive probe: one cross-attention that learns where to look in a layer's tokens.

With normalized tokens x_1 ... x_N (d wide) of the last layer, or another, and, for each head h, a query q_h,

    a_h = softmax_n(q_h . K_h x_n / sqrt(d / heads))
    z   = pooled + W_out [V_h sum_n a_hn x_n]_h

and the classifier reads z, standardized. K_h and V_h are d -> d / heads; no biases (that of K_h would cancel in the
softmax, those of V_h and W_out in the classifier's own). d + 2d^2 + dw parameters, for pooled features w wide.

The pooler is that of the evaluations of AIM (arXiv 2401.08541) and V-JEPA (arXiv 2404.08471). A search over `layer` is
InCA (Dukler et al., arXiv 2303.04105): independent cross-attention adapters of several layers, trained in one pass over
the frozen features, of which validation chooses one. Ours: its output is added
to the pooled features that every method reads, through a W_out that starts at zero (at step 0 this is the linear
probe), and K_h and V_h are moved past the sums over tokens, which gives the same at a small part of the cost.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import MethodOptions, choose_layers, require_divisor, require_several_tokens
from adapt.methods.readout import Pooling, Readout, classify_stacked
from adapt.methods.stack import Stack
from store.config import Last, PositiveInt


class AttentiveProbeOptions(MethodOptions):
    """Options of `attentive_probe`.

    Args:
        num_heads: heads of the attention; must divide d.
        pool: what the head reads besides; see `adapt.methods.readout.Readout`.
        layer: which of the stored layers: last, or the number of a block.
    """

    num_heads: PositiveInt = 8
    pool: Pooling = "auto"
    layer: Literal["last"] | int = Field("last", description="last, or the number of a block")


class AttentionPooler(nn.Module):
    """Attention of one learned query over all tokens; its output is zero until `out` is trained.

    Args:
        dim: width of the tokens.
        width: width of the output.
        num_heads: heads of the attention.
    """

    def __init__(self, dim: int, width: int, num_heads: int) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.query = nn.Parameter(torch.empty(num_heads, head_dim))
        self.key = nn.Parameter(torch.empty(num_heads, head_dim, dim))
        self.value = nn.Parameter(torch.empty(num_heads, head_dim, dim))
        self.out = nn.Linear(dim, width, bias=False)
        for tensor in (self.query, self.key, self.value):
            nn.init.trunc_normal_(tensor, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch width"]:
        """Pool tokens."""
        # q . (K x) = (K^T q) . x, and sum_n a_n (V x_n) = V sum_n a_n x_n: no token is ever projected. Plain products
        # train faster here than a fused attention, which would also compute the gradient of the frozen tokens.
        scale = self.query.shape[1] ** -0.5
        projected_query = torch.einsum("hc,hcd->dh", self.query, self.key) * scale  # (dim, heads)
        attention = (tokens @ projected_query).softmax(dim=1)  # (batch, tokens, heads)
        averages = attention.transpose(1, 2) @ tokens  # (batch, heads, dim)
        pooled: Tensor = self.out(torch.einsum("bhd,hcd->bhc", averages, self.value).flatten(1))
        return pooled


class AttentiveProbe(nn.Module):
    """The pooler and its classifier.

    Args:
        spec: the features; one of their layers is read.
        num_classes: width of the classifier.
        options: see `AttentiveProbeOptions`.

    Raises:
        UserError: a layer that is not in the features; `num_heads` does not divide the width; there is only one token,
            so nothing to choose from.
    """

    def __init__(
        self, spec: FeatureSpec, num_classes: int, options: AttentiveProbeOptions = AttentiveProbeOptions()
    ) -> None:
        super().__init__()
        self.layers = choose_layers(Last(last=1) if options.layer == "last" else [options.layer], spec)
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers)
        require_divisor("num_heads", options.num_heads, spec.dim)
        require_several_tokens("attentive_probe", spec)
        self.options = options
        self.pooler = AttentionPooler(spec.dim, self.readout.head.in_features, options.num_heads)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch, layer = TokenBatch.of(tokens), self.layers[-1]
        attended = self.pooler(batch.normalized(layer, self.readout.tail))
        return self.readout.classify(self.readout.pooled(batch) + attended)


def stack_attentive_probes(models: Sequence[AttentiveProbe]) -> Stack:
    """Stack probes: the heads of all models attend to the tokens in one product; see `adapt.methods.stack.Stack`."""
    poolers, readouts = [model.pooler for model in models], [model.readout for model in models]
    layer, heads = models[0].layers[-1], models[0].options.num_heads

    def forward(tokens: TokensByLayer, _: Sequence[torch.Generator]) -> Float[Tensor, "models batch classes"]:
        batch = TokenBatch.of(tokens)
        x = batch.normalized(layer, readouts[0].tail)
        query, key, value, out = (
            torch.stack(tensors)
            for tensors in zip(*((p.query, p.key, p.value, p.out.weight) for p in poolers), strict=True)
        )
        # one attention over the tokens for the heads of all models
        projected_query = torch.einsum("mhc,mhcd->mhd", query, key).flatten(0, 1) * query.shape[-1] ** -0.5
        attention = F.linear(x, projected_query).softmax(dim=1)  # (batch, tokens, models * heads)
        averages = (attention.transpose(1, 2) @ x).transpose(0, 1)  # (models * heads, batch, dim)
        # the maps of each model
        values = averages @ value.flatten(0, 1).transpose(1, 2)
        attended = values.view(len(models), heads, len(x), -1).transpose(1, 2).flatten(2) @ out.transpose(
            1, 2
        )  # (models, batch, width)
        return classify_stacked(readouts, readouts[0].pooled(batch) + attended)

    return forward
