"""Transformer probe: one new pre-norm transformer block on the last layer's tokens, below the linear probe.

    x' = x + attention(norm(x)),    y = x' + mlp(norm(x'))

with a bias on q, k and v and an MLP four times as wide as the tokens: 12d^2 + 13d parameters for tokens d wide. The
block is that of ViT (Dosovitskiy et al., arXiv 2010.11929); it stands before the backbone's frozen final norm, where a
further block of the backbone would. Ours: the last map of either branch starts at zero (at step 0 this is the linear
probe).
"""

from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from adapt.methods.readout import Pool, Readout
from store.config import PositiveInt
from store.errors import UserError
from store.strict_model import StrictModel


class TransformerProbeOptions(StrictModel):
    """Options of `transformer_probe`; see `TransformerProbe`."""

    num_heads: PositiveInt = 8
    pool: Pool = "auto"


class TransformerProbe(nn.Module):
    """The block and its classifier.

    Args:
        spec: width, token layout and frozen tail of the backbone; the last of its layers is read.
        num_classes: width of the classifier.
        num_heads: heads of the attention, which must divide the width of the tokens.
        pool: what the classifier reads; see `adapt.methods.readout.Readout`.

    Raises:
        UserError: `num_heads` does not divide the width.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, num_heads: int = 8, pool: Pool = "auto") -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)  # first, so that every method draws the same head from a seed
        self.layers = spec.layers[-1:]
        check_divides("num_heads", num_heads, spec.dim)
        self.block = Block(spec.dim, num_heads, qkv_bias=True)
        for last in ("attn.proj", "mlp.fc2"):
            for parameter in self.block.get_submodule(last).parameters():
                nn.init.zeros_(parameter)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        logits: Tensor = self.readout(self.readout.normalize(self.block(tokens[self.layers[-1]])))
        return logits


def check_divides(option: str, value: int, width: int, of: str = "the tokens") -> None:
    """Refuse a number of heads, or the like, that does not share a width evenly."""
    if width % value:
        legal = ", ".join(str(number) for number in range(1, min(width, 32) + 1) if width % number == 0)
        raise UserError(f"{option} {value} does not divide the width {width} of {of}; legal: {legal}")
