"""Draws the view by which an epoch of training sees each sample: the plain one, or one of its augmented views."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from adapt.features.feature_source import BatchReader, Rows
from adapt.methods.feature_spec import TokensByLayer
from extract.forward.device import to_device
from store.schema import AUGMENTED

_VIEWS = 2  # what random numbers are drawn for: `batch_order` draws others from the same epoch


class DrawnViews:
    """Batches of the training split, in which every sample is read by a view that is drawn for the epoch.

    All seeds share the draw, as they share the order of the rows, so that they share each read.

    Args:
        features: the features; they have the split `augmented`.
        rows: for every row of `train`, the rows of `augmented` that show its sample.
        epoch: number of the epoch, from 0.
    """

    def __init__(self, features: BatchReader, rows: Int[np.ndarray, "samples views"], epoch: int) -> None:
        self._features, self._rows = features, rows
        n_samples, n_views = rows.shape
        draw = np.random.default_rng([epoch, _VIEWS])
        self._drawn = draw.integers(1 + n_views, size=n_samples) - 1  # -1 is the plain view

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `adapt.features.feature_source.Features.batches`; `split` is `train`."""
        # both splits are read at the same time; groups that need nothing of one are not read from it
        is_plain = [self._drawn[rows] < 0 for rows in groups]
        plain = [rows[chosen] for rows, chosen in zip(groups, is_plain, strict=True)]
        augmented = [self._augmented(rows[~chosen]) for rows, chosen in zip(groups, is_plain, strict=True)]
        of_plain, of_augmented = (
            self._features.batches(name, [rows for rows in wanted if len(rows)], layers, together)
            for name, wanted in ((split, plain), (AUGMENTED, augmented))
        )
        for rows, chosen in zip(groups, is_plain, strict=True):
            if chosen.all():
                yield rows, next(of_plain)[1]
            elif not chosen.any():
                yield rows, next(of_augmented)[1]
            else:
                yield rows, _join(chosen, next(of_plain)[1], next(of_augmented)[1])

    def _augmented(self, rows: Rows) -> Rows:
        """The rows of `augmented` that are drawn for some rows of `train`."""
        drawn: Rows = self._rows[rows, self._drawn[rows]]
        return drawn


def _join(is_first: Bool[np.ndarray, "_"], first: Any, second: Any) -> TokensByLayer:
    """The tokens of the rows of a batch, of which some are in one part and the others in another one."""
    device = next(iter(first.values())).device
    rows = [to_device(torch.from_numpy(np.flatnonzero(chosen)), device) for chosen in (is_first, ~is_first)]
    joined = {layer: tokens.new_empty(len(is_first), *tokens.shape[1:]) for layer, tokens in first.items()}
    for layer, tokens in joined.items():
        for index, part in zip(rows, (first, second), strict=True):
            tokens.index_copy_(0, index, part[layer])
    return joined
