"""Transformer probe: one new pre-norm transformer block on the last layer's tokens, below the linear probe.

    x' = x + attention(norm(x)),    y = x' + mlp(norm(x'))

with a bias on q, k and v and an MLP four times as wide as the tokens: 12d^2 + 13d parameters for tokens d wide. The
block is that of ViT (Dosovitskiy et al., arXiv 2010.11929); it comes before the backbone's frozen final norm, like one
more block of the backbone. Ours: the last map of either branch starts at zero (at step 0 this is the linear probe).
"""

from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from adapt.methods.options import MethodOptions, require_divisor
from adapt.methods.readout import Pooling, Readout
from store.config import PositiveInt


class TransformerProbeOptions(MethodOptions):
    """Options of `transformer_probe`.

    Args:
        num_heads: heads of the block; must divide d.
        pool: what the head reads; see `adapt.methods.readout.Readout`.
    """

    num_heads: PositiveInt = 8
    pool: Pooling = "auto"


class TransformerProbe(nn.Module):
    """The block and its classifier.

    Args:
        spec: the features; the last of their layers is read.
        num_classes: width of the classifier.
        options: see `TransformerProbeOptions`.

    Raises:
        UserError: `num_heads` does not divide the width.
    """

    def __init__(
        self, spec: FeatureSpec, num_classes: int, options: TransformerProbeOptions = TransformerProbeOptions()
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, options.pool)  # first: all methods draw the same head from a seed
        self.layers = spec.layers[-1:]
        require_divisor("num_heads", options.num_heads, spec.dim)
        self.block = Block(spec.dim, options.num_heads, qkv_bias=True)
        for last in ("attn.proj", "mlp.fc2"):
            for parameter in self.block.get_submodule(last).parameters():
                nn.init.zeros_(parameter)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        logits: Tensor = self.readout(self.readout.normalize(self.block(tokens[self.layers[-1]])))
        return logits
