"""Convolutional ladder: convolutions beside a frozen backbone, and queries that read what is where.

With the patches b_1 ... b_L (patches, d) of L chosen layers, a side network r wide and h_0 = 0,

    m_i = h_{i-1} + W_i norm(b_i)
    h_i = m_i + conv_i(GELU(m_i))                        3 x 3, over the grid of patches
    a_k = softmax_n(q_k . x_n),   x = norm'(h_L)         K queries
    z   = pooled + W_out [sum_n a_kn x_n, sum_n a_kn p_n]_k

and the classifier reads z, standardized; p_n is a learned vector for the place n of a patch. norm is a LayerNorm
without parameters, norm' has weight and bias. For pooled features w wide and N patches the parameters are

    L (dr + r)         W_i
    L (9r^2 + r)       conv_i
    2r + Kr + Nr       norm', q_k and p_n
    2Krw               W_out, which starts at zero (at step 0 this is the linear probe)

The method is ours, for tasks in which the class is a matter of place, number or direction. Its parts are known: the
side network that reads every layer from Ladder Side-Tuning (arXiv 2206.06522), convolutions in a bottleneck on the grid
of patches from Convpass (arXiv 2207.07039), several queries from EP (arXiv 2506.10178). Pooling by a mean forgets where
a patch was; the values p_n bring that to the classifier. Frames of videos are convolved one by one.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import SIDE_LAYERS_HELP, MethodOptions, SideLayers, choose_layers
from adapt.methods.readout import Pooling, Readout
from store.config import PositiveInt
from store.errors import UserError


class ConvLadderOptions(MethodOptions):
    """Options of `conv_ladder`.

    Args:
        width: r, of the side network.
        num_queries: K, how many queries.
        pool: what the head reads besides; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: auto (at most four, evenly spread), all, a list of blocks, {every: k},
            {spread: n} or {last: n} of those stored.
        dropout: on what the queries read.
    """

    width: PositiveInt = 64
    num_queries: PositiveInt = 16
    pool: Pooling = "auto"
    layers: SideLayers = Field("auto", description=SIDE_LAYERS_HELP)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


class ConvLadder(nn.Module):
    """The side network and its classifier.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `ConvLadderOptions`.

    Raises:
        UserError: a layer that is not in the features; there are fewer than two patches, so no place to tell.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: ConvLadderOptions = ConvLadderOptions()) -> None:
        super().__init__()
        self.layers, self.layout = choose_layers(options.layers, spec), spec.layout
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers[-1:])
        if spec.layout.num_patches < 2:
            raise UserError(
                f"conv_ladder reads a grid of patches, but the features hold {spec.layout}: "
                "set store.tokens to all or {pool: k}, or take linear_probe"
            )
        width, queries = options.width, options.num_queries
        self.downs = nn.ModuleList(nn.Linear(spec.dim, width) for _ in self.layers)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.layers)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, queries, bias=False)
        self.places = nn.Parameter(0.1 * torch.randn(spec.layout.num_patches, width))
        self.dropout = nn.Dropout(options.dropout)
        self.out = nn.Linear(2 * queries * width, self.readout.head.in_features, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch = TokenBatch.of(tokens)
        x = self.norm(self._climb(batch))  # (batch, patches, width)
        attention = self.queries(x).softmax(dim=1).transpose(1, 2)  # (batch, queries, patches)
        found = torch.cat([attention @ x, attention @ self.places], dim=2).flatten(1)
        return self.readout.classify(self.readout.pooled(batch) + self.out(self.dropout(found)))

    def _climb(self, batch: TokenBatch) -> Float[Tensor, "batch patches width"]:
        """h_L."""
        height, width = self.layout.grid[-2:]
        h: Tensor | None = None
        for layer, down, convolution in zip(self.layers, self.downs, self.convolutions, strict=True):
            rung = down(batch.layer_norm(layer)[:, self.layout.num_prefix_tokens :])
            m = rung if h is None else h + rung
            # every frame is an image; the permuted view is in PyTorch's channels-last format, so nothing is copied
            images = F.gelu(m).view(-1, height, width, m.shape[2]).permute(0, 3, 1, 2)
            h = m + convolution(images).permute(0, 2, 3, 1).reshape(m.shape)
        assert h is not None
        return h
