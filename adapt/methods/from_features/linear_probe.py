"""The linear probe: a linear classifier on frozen features, the baseline of all other methods."""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import LAYERS_HELP, MethodOptions, choose_layers
from adapt.methods.readout import Pooling, Readout
from store.config import Last, Layers


class LinearProbeOptions(MethodOptions):
    """Options of `linear_probe`.

    Args:
        pool: what the head reads; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: all, a list of blocks, {every: k}, {spread: n} or {last: n} of those stored;
            their pooled features are concatenated.
    """

    pool: Pooling = "auto"
    layers: Layers = Field(Last(last=1), description=LAYERS_HELP)


class LinearProbe(nn.Module):
    """A linear classifier on the pooled tokens of some layers, which are concatenated.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `LinearProbeOptions`.

    Raises:
        UserError: a layer that is not in the features.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: LinearProbeOptions = LinearProbeOptions()) -> None:
        super().__init__()
        self.layers = choose_layers(options.layers, spec)
        self.readout = Readout(spec, num_classes, options.pool, self.layers)

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        return self.readout.classify(self.readout.pooled(TokenBatch.of(tokens)))
