"""The linear probe: a linear classifier on frozen features, the baseline of all other methods."""

from jaxtyping import Float
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import MethodOptions
from adapt.methods.readout import Pooling, Readout


class LinearProbeOptions(MethodOptions):
    """Options of `linear_probe`.

    Args:
        pool: what the head reads; see `adapt.methods.readout.Readout`.
    """

    pool: Pooling = "auto"


class LinearProbe(nn.Module):
    """A linear classifier on the pooled last layer.

    Args:
        spec: the features; the last of their layers is read.
        num_classes: width of the classifier.
        options: see `LinearProbeOptions`.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LinearProbeOptions = LinearProbeOptions()) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, options.pool)
        self.layers = spec.layers[-1:]

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        return self.readout.classify(self.readout.pooled(TokenBatch.of(tokens), self.layers[-1]))
