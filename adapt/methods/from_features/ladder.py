"""Ladder Side-Tuning: a narrow transformer beside a frozen backbone (Sung et al., NeurIPS 2022, arXiv 2206.06522).

With tokens b_1 ... b_L (tokens, d) of L chosen layers and a side network s = d / reduction wide,

    h_1 = block_1(W_1 norm(b_1))
    h_i = block_i(mu_i W_i norm(b_i) + (1 - mu_i) h_{i-1}),    mu_i = sigmoid(alpha_i / T),  T = 0.1

and the classifier reads final_norm(b_L + W_up h_L). With biases, the parameters are

    L (12s^2 + 13s)    blocks: attention, and an MLP 4s wide
    L (ds + s)         W_i
    L - 1              alpha_i, which start at zero
    sd + d             W_up

The paper's: the ladder of gated shortcuts into a narrow copy of the architecture, no gradient into the backbone. Ours:
norm(b_i) is a LayerNorm without parameters, as in LoSA; the paper starts from the embeddings, which are not stored, so
the first block reads W_1 norm(b_1) alone; the blocks are drawn at random, not pruned from the backbone's; W_up starts
at zero (at step 0 the ladder is the linear probe).
"""

import torch
from jaxtyping import Float
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import SIDE_LAYERS_HELP, MethodOptions, SideLayers, choose_layers, require_divisor
from adapt.methods.readout import Pooling, Readout
from store.config import PositiveInt

_TEMPERATURE = 0.1  # T


class LadderOptions(MethodOptions):
    """Options of `ladder`.

    Most of the time goes into the heads, and narrow ones take as long as wide ones, so there are few by default.

    Args:
        reduction: how many times narrower than the backbone the side network is; must divide d.
        num_heads: heads of the side blocks; must divide their width.
        pool: what the head reads; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: auto (at most four, evenly spread), all, a list of blocks, {every: k},
            {spread: n} or {last: n} of those stored.
    """

    reduction: PositiveInt = 8
    num_heads: PositiveInt = 2
    pool: Pooling = "auto"
    layers: SideLayers = Field("auto", description=SIDE_LAYERS_HELP)


class Ladder(nn.Module):
    """The side network and its classifier.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `LadderOptions`.

    Raises:
        UserError: a layer that is not in the features; `reduction` or `num_heads` does not divide its width.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LadderOptions = LadderOptions()) -> None:
        super().__init__()
        self.layers = choose_layers(options.layers, spec)
        # first: all methods draw the same head from a seed
        self.readout = Readout(spec, num_classes, options.pool, self.layers[-1:])
        require_divisor("reduction", options.reduction, spec.dim)
        side = spec.dim // options.reduction
        of_side = f"the side network ({spec.dim} / reduction {options.reduction})"
        require_divisor("num_heads", options.num_heads, side, of=of_side)
        self.downs = nn.ModuleList(nn.Linear(spec.dim, side) for _ in self.layers)
        self.blocks = nn.ModuleList(Block(side, options.num_heads, qkv_bias=True) for _ in self.layers)
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in self.layers[1:])  # alpha_2 ... alpha_L
        self.up = nn.Linear(side, spec.dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        batch, h = TokenBatch.of(tokens), None
        for layer, down, gate, block in zip(self.layers, self.downs, [None, *self.gates], self.blocks, strict=True):
            rung = down(batch.layer_norm(layer))
            if h is not None and gate is not None:
                mu = torch.sigmoid(gate / _TEMPERATURE)
                rung = mu * rung + (1 - mu) * h
            h = block(rung)
        last = tokens[self.layers[-1]]
        logits: Tensor = self.readout(self.readout.normalize(last + self.up(h)))
        return logits
