"""The linear probe: what frozen features give by themselves."""

from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from adapt.methods.readout import Pool, Readout
from store.strict_model import StrictModel


class LinearProbeOptions(StrictModel):
    """Options of `linear_probe`."""

    pool: Pool = "auto"


class LinearProbe(nn.Module):
    """A linear classifier on the pooled last layer.

    Args:
        spec: width, token layout and frozen tail of the backbone; the last of its layers is read.
        num_classes: width of the classifier.
        pool: what the classifier reads; see `adapt.methods.readout.Readout`.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, pool: Pool = "auto") -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)
        self.layers = spec.layers[-1:]

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        logits: Tensor = self.readout(self.readout.normalize(tokens[self.layers[-1]]))
        return logits
