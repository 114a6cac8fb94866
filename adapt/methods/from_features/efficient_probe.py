"""Efficient probe: many queries look at the last layer's tokens, none of which is projected to a key.

With normalized tokens x_1 ... x_N (d wide) of the last layer, Q queries q_j and the slices V_j (d -> d / Q) of one map,

    a_j = softmax_n(q_j . x_n / sqrt(d))
    z   = pooled + [V_1 sum_n a_1n x_n, ..., V_Q sum_n a_Qn x_n]

and the classifier reads z, standardized: d^2 + Qd parameters. Of class token and patch mean together, which are 2d
wide, the second is added to.

The pooler is EP (Psomas et al., arXiv 2506.10178). Ours: it is added to the pooled features that every method reads,
and V starts at zero (at step 0 this is the linear probe).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import MethodOptions, require_divisor, require_several_tokens
from adapt.methods.readout import Pooling, Readout, classify_stacked
from adapt.methods.stack import Stack
from store.config import PositiveInt


class EfficientProbeOptions(MethodOptions):
    """Options of `efficient_probe`.

    Args:
        num_queries: Q; must divide d.
        pool: what the head reads besides; see `adapt.methods.readout.Readout`.
    """

    num_queries: PositiveInt = 32
    pool: Pooling = "auto"


class EfficientProbe(nn.Module):
    """The pooler and its classifier.

    Args:
        spec: the features; the last of their layers is read.
        num_classes: width of the classifier.
        options: see `EfficientProbeOptions`.

    Raises:
        UserError: `num_queries` does not divide the width; there is only one token, so nothing to choose from.
    """

    def __init__(
        self, spec: FeatureSpec, num_classes: int, options: EfficientProbeOptions = EfficientProbeOptions()
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, options.pool)  # first: all methods draw the same head from a seed
        self.layers = spec.layers[-1:]
        require_divisor("num_queries", options.num_queries, spec.dim)
        require_several_tokens("efficient_probe", spec)
        self.options = options
        self.query = nn.Parameter(torch.empty(options.num_queries, spec.dim))
        self.value = nn.Parameter(torch.zeros(options.num_queries, spec.dim // options.num_queries, spec.dim))
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch, layer = TokenBatch.of(tokens), self.layers[-1]
        x = batch.normalized(layer, self.readout.tail)
        attention = F.linear(x, self.query * x.shape[2] ** -0.5).softmax(dim=1)  # (batch, tokens, queries)
        averages = attention.transpose(1, 2) @ x  # (batch, queries, dim)
        attended = torch.einsum("bqd,qcd->bqc", averages, self.value).flatten(1)
        pooled = self.readout.pooled(batch)
        return self.readout.classify(pooled + F.pad(attended, (pooled.shape[1] - attended.shape[1], 0)))


def stack_efficient_probes(models: Sequence[EfficientProbe]) -> Stack:
    """Stack probes: the queries of all models attend to the tokens in one product; see `adapt.methods.stack.Stack`."""
    readouts, layer = [model.readout for model in models], models[0].layers[-1]
    width, queries = models[0].readout.head.in_features, models[0].options.num_queries

    def forward(tokens: TokensByLayer, _: Sequence[torch.Generator]) -> Float[Tensor, "models batch classes"]:
        batch = TokenBatch.of(tokens)
        x = batch.normalized(layer, readouts[0].tail)
        query = torch.cat([model.query for model in models]) * x.shape[2] ** -0.5
        attention = F.linear(x, query).softmax(dim=1)  # (batch, tokens, models * queries)
        averages = (attention.transpose(1, 2) @ x).transpose(0, 1)  # (models * queries, batch, dim)
        slices = averages @ torch.cat([model.value for model in models]).transpose(1, 2)
        attended = slices.view(len(models), queries, len(x), -1).transpose(1, 2).flatten(2)  # (models, batch, dim)
        added = F.pad(attended, (width - attended.shape[2], 0))
        return classify_stacked(readouts, readouts[0].pooled(batch) + added)

    return forward
