"""Layer fusion: one cross-attention over the class token and the patch mean of every layer.

With the normalized class tokens and patch means u_1 ... u_2L (d wide) of L chosen layers and, for each head h, a query
q_h,

    a_h = softmax_n(q_h . K_h u_n / sqrt(d / heads))
    z   = pooled + W_out [V_h sum_n a_hn u_n]_h

and the classifier reads z, standardized. d + 2d^2 + dw parameters, for pooled features w wide. Without a class token,
or without patches, there are L vectors.

The fusion is ALF (arXiv 2601.09322). Ours: it is added to the pooled last layer that every method reads, through a
W_out that starts at zero (at step 0 this is the linear probe).
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.from_features.attentive_probe import AttentionPooler
from adapt.methods.options import LAYERS_HELP, MethodOptions, choose_layers, require_divisor
from adapt.methods.readout import Pooling, Readout
from store.config import Layers, PositiveInt


class LayerFusionOptions(MethodOptions):
    """Options of `layer_fusion`.

    Args:
        num_heads: heads of the attention; must divide d.
        pool: what the head reads besides, of the last layer, and what is read of every layer; see
            `adapt.methods.readout.Readout`.
        layers: which of the stored layers: all, a list of blocks, {every: k}, {spread: n} or {last: n} of those stored.
    """

    num_heads: PositiveInt = 8
    pool: Pooling = "auto"
    layers: Layers = Field("all", description=LAYERS_HELP)


class LayerFusion(nn.Module):
    """The attention over layers and its classifier.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `LayerFusionOptions`.

    Raises:
        UserError: a layer that is not in the features; `num_heads` does not divide the width.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LayerFusionOptions = LayerFusionOptions()) -> None:
        super().__init__()
        self.layers = choose_layers(options.layers, spec)
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers[-1:])
        require_divisor("num_heads", options.num_heads, spec.dim)
        self.dim = spec.dim
        self.pooler = AttentionPooler(spec.dim, self.readout.head.in_features, options.num_heads)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch = TokenBatch.of(tokens)
        pooled = torch.cat([self.readout.pooled_layer(batch, layer) for layer in self.layers], dim=1)
        attended = self.pooler(pooled.view(len(pooled), -1, self.dim))
        return self.readout.classify(self.readout.pooled(batch) + attended)
