"""Features that the frozen backbone computes for every batch; nothing is stored."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from adapt.features.feature_source import Rows
from adapt.features.frozen import FrozenFeatures
from adapt.features.specs import spec_of_backbone
from adapt.methods.feature_spec import TokensByLayer
from extract.forward.frozen_forward import FrozenForward
from extract.sources.open_source import ImageSource
from store.config import Tokens
from store.errors import UserError
from store.schema import AUGMENTED


class OnlineFeatures(FrozenFeatures):
    """A forward pass of the frozen backbone for every batch.

    Args:
        source: the samples.
        forward: the frozen backbone.
        tokens: which of its tokens are kept, as in `store.tokens`.
        layers: those of the spec; by default those that `forward` gives.
    """

    kind = "online"

    def __init__(
        self, source: ImageSource, forward: FrozenForward, tokens: Tokens, layers: Sequence[int] | None = None
    ) -> None:
        self._source, self._forward, self.device = source, forward, forward.device
        self.spec = spec_of_backbone(forward.backbone, layers or forward.layers, tokens)
        self.num_classes, self.multi_label = len(source.classes), source.multi_label
        self.views = source.views
        if augmented := source.splits.get(AUGMENTED):
            self.view_rows = np.arange(len(augmented)).reshape(len(source.splits["train"]), -1)

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return torch.from_numpy(np.asarray(self._source.splits[split].labels))

    def validation_rows(self) -> Rows | None:
        """See `Features.validation_rows`."""
        marks = self._source.splits["train"].validation
        return None if marks is None else np.flatnonzero(marks)

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        images = self._source.splits[split]
        for batch in self._forward.batches(images, [group.tolist() for group in groups]):
            if batch.failed:
                raise UserError(f"{next(iter(batch.failed.values()))} (online training cannot skip samples)")
            assert batch.images is not None
            yield np.array(batch.rows), self._forward(batch.images, layers)
