"""The linear probe: what frozen features give by themselves."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from adapt.readout import Pool, Readout
from adapt.spec import FeatureSpec


class LinearProbe(nn.Module):
    """A linear classifier on the pooled last layer.

    Args:
        spec: width, token layout and frozen tail of the backbone; the last of its layers is read.
        num_classes: width of the classifier.
        pool: what the classifier reads; see `adapt.readout.Readout`.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, pool: Pool = "mean") -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)
        self.layers = spec.layers[-1:]

    def pooled(self, tokens: Mapping[int, Float[Tensor, "batch tokens dim"]]) -> Float[Tensor, "batch features"]:
        """Everything before the first trained parameter; it can be computed once and kept."""
        return self.readout.pool(self.readout.normalise(tokens[self.layers[-1]]))

    def forward(self, tokens: Mapping[Any, Tensor]) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}, or from {pool: what `pooled` returned}."""
        features = tokens[self.readout.mode] if self.readout.mode in tokens else self.pooled(tokens)
        logits: Tensor = self.readout.head(features)
        return logits
