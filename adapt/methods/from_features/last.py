"""LAST, low-rank attention side-tuning: a side stream of narrow self-attention (Tang et al., arXiv 2402.04009).

With tokens b_1 ... b_L (tokens, d) of L chosen layers,

    x_i = norm(b_1 + ... + b_i + y_{i-1}),    y_i = y_{i-1} + W_out,i attention_i(W_q,i x_i, W_k,i x_i, W_v,i x_i)

with y_0 = 0 and an attention r wide in all, and the classifier reads the pooled y_L. With biases L(4dr + 3r + d)
parameters.

The paper's: attention of rank r as the only module, which reads the sum of the frozen outputs and the side stream; the
frozen sum is taken out again before the classifier, and nothing has a gradient into the backbone. Ours: norm is a
LayerNorm without parameters; the classifier reads y_L beside the pooled last layer, to which it is added as in the
attentive probe, through W_out,i that start at zero (at step 0 this is the linear probe).
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import (
    SIDE_LAYERS_HELP,
    MethodOptions,
    SideLayers,
    choose_layers,
    require_divisor,
    require_rank,
)
from adapt.methods.readout import Pooling, Readout
from store.config import PositiveInt


class LASTOptions(MethodOptions):
    """Options of `last`.

    Args:
        rank: r, width of the attention, all heads together.
        num_heads: heads of the attention; must divide r.
        pool: what the head reads; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: auto (at most four, evenly spread), all, a list of blocks, {every: k},
            {spread: n} or {last: n} of those stored.
        dropout: on the output of the attention, before W_out.
    """

    rank: PositiveInt = 32
    num_heads: PositiveInt = 4
    pool: Pooling = "auto"
    layers: SideLayers = Field("auto", description=SIDE_LAYERS_HELP)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class LowRankAttention(nn.Module):
    """Self-attention between a map down to `rank` and one up again, which starts at zero.

    Args:
        dim: width of the tokens.
        options: see `LASTOptions`.
    """

    def __init__(self, dim: int, options: LASTOptions) -> None:
        super().__init__()
        self.num_heads, self.dropout = options.num_heads, options.dropout
        self.down = nn.Linear(dim, 3 * options.rank)
        self.up = nn.Linear(options.rank, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """What is added to the side stream."""
        three_by_head = self.down(x).view(len(x), x.shape[1], 3 * self.num_heads, -1).transpose(1, 2)
        query, key, value = three_by_head.chunk(3, dim=1)  # (batch, heads, tokens, rank / heads) each
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        added: Tensor = self.up(F.dropout(attended, self.dropout, self.training))
        return added


class LAST(nn.Module):
    """The side network and its classifier.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `LASTOptions`.

    Raises:
        UserError: a layer that is not in the features; the rank is no bottleneck, or `num_heads` does not divide it.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LASTOptions = LASTOptions()) -> None:
        super().__init__()
        self.layers = choose_layers(options.layers, spec)
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers[-1:])
        require_rank(options.rank, spec.dim)
        require_divisor("num_heads", options.num_heads, options.rank, of="the attention (rank)")
        self.attentions = nn.ModuleList(LowRankAttention(spec.dim, options) for _ in self.layers)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch = TokenBatch.of(tokens)
        y: Tensor | None = None
        for number, attention in enumerate(self.attentions, start=1):
            frozen = self._sum(batch, self.layers[:number])
            added = attention(F.layer_norm(frozen if y is None else frozen + y, frozen.shape[-1:]))
            y = added if y is None else y + added
        assert y is not None
        return self.readout.classify(self.readout.pooled(batch) + self.readout.pool(y))

    def _sum(self, batch: TokenBatch, layers: tuple[int, ...]) -> Float[Tensor, "batch tokens dim"]:
        """The sum of some layers' tokens, computed once for all models of a batch."""
        *before, layer = layers
        if not before:
            return batch[layer]
        return batch.remember(("sum", layers), layer, lambda: self._sum(batch, tuple(before)) + batch[layer])
