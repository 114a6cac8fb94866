"""The methods that resident, streamed and online features share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from adapt.features.drawn_views import DrawnViews
from adapt.features.feature_source import BatchReader
from adapt.methods.feature_spec import FeatureSpec
from extract.forward.device import bytes_at_once

# Bytes of float32 tokens that a pass holds at once; its activations take a few times as much.
_BYTES_ON_CPU, _SHARE_OF_GPU = 64 * 2**20, 1 / 24
_FORWARD_ERROR = 2.0**-18  # of a token's RMS: the rounding of a float32 forward, which depends on the batch it runs in


class FrozenFeatures(BatchReader):
    """Features of a frozen backbone; a base class.

    Attributes:
        view_rows: for every row of `train`, the rows of `augmented` that show its sample; None if there are none.
    """

    spec: FeatureSpec
    device: torch.device
    view_rows: Int[np.ndarray, "samples views"] | None = None

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """See `Features.samples_at_once`."""
        n_bytes = 4 * len(layers) * self.spec.layout.num_tokens * self.spec.dim
        return max(1, bytes_at_once(self.device, _BYTES_ON_CPU, _SHARE_OF_GPU) // n_bytes)

    def part_size(self, layers: Sequence[int]) -> int:
        """Number of samples whose tokens of all layers fit, so that it does not depend on the layers that are read."""
        return self.samples_at_once(self.spec.layers)

    def for_epoch(self, seed: int, epoch: int) -> Any:
        """See `Features.for_epoch`: in every epoch the same, unless there are augmented views to draw from."""
        return self if self.view_rows is None else DrawnViews(self, self.view_rows, epoch)

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`: that of the frozen forward."""
        return (_FORWARD_ERROR * tokens.square().mean(dim=-1, keepdim=True).sqrt()).expand_as(tokens)
