"""Selects, of every part of a batch, what one seed trains on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adapt.training.batch_order import Rows
from adapt.training.batches import mix, scale_channels, select
from adapt.training.objective import Objective
from adapt.training.seed_rows import SeedRows, mask_of
from adapt.training.settings import Settings
from extract.forward.device import to_device

_DROPOUT, _MIXUP, _NOISE = 0, 1, 2  # what random numbers are drawn for


@dataclass(frozen=True, kw_only=True)
class SeedPart:
    """The rows of a part of a batch that one seed trains on.

    Args:
        inputs: inputs of the models: tokens by layer, or images.
        targets: (weight, labels) pairs, which the loss is summed over; mixup makes two.
        batch_labels: labels of all rows of the batch that the seed trains on.
        objective: the loss of the seed.
        random_seed: of dropout.
        smoothing: of the labels.
    """

    inputs: Any
    targets: Sequence[tuple[float, Shaped[Tensor, "rows ..."]]]
    batch_labels: Shaped[Tensor, "batch ..."]
    objective: Objective
    random_seed: int
    smoothing: float

    def loss(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
        """The contribution of the part to the mean loss of the batch."""
        losses = [
            share * self.objective(logits, labels, self.batch_labels, self.smoothing) for share, labels in self.targets
        ]
        return torch.stack(losses).sum()


class PartRows(NamedTuple):
    """The rows of a batch and of a part of it, with the numbers of its epoch, of its step, and of the part there."""

    batch: Rows
    rows: Rows
    epoch: int
    step: int
    number: int


class SeedParts:
    """Gives the part of one seed of every part of a batch.

    Args:
        data: the rows of the seed.
        labels: labels of all rows of the training split.
        device: of the inputs.

    Attributes:
        mask: for every row of the training split, whether the seed trains on it.
    """

    def __init__(self, data: SeedRows, labels: Shaped[Tensor, "rows ..."], device: torch.device) -> None:
        self._data, self._labels, self._device = data, labels, device
        self._objective = data.objective.to(device)
        self.mask = mask_of(data.rows, len(labels))

    def part(self, of: PartRows, values: Any, settings: Settings) -> SeedPart | None:
        """The rows of a part that the seed trains on; None if there are none.

        Args:
            of: the part.
            values: tokens by layer, or images, of its rows.
            settings: of which mixup, noise and label smoothing count.
        """
        index = np.flatnonzero(self.mask[of.rows])
        if not len(index):
            return None
        inputs, labels = select(values, index, len(of.rows)), self._labels_of(of.rows[index])
        targets: list[tuple[float, Tensor]] = [(1.0, labels)]
        if settings.mixup:
            share, order = self._draw_mixup(settings.mixup, len(labels), self._random_seed(of, _MIXUP))
            inputs = mix(inputs, order, share)
            targets = [(share, labels), (1 - share, labels[order])]
        if settings.feature_noise:
            inputs = scale_channels(inputs, settings.feature_noise, self._random_seed(of, _NOISE))
        return SeedPart(
            inputs=inputs,
            targets=targets,
            batch_labels=self._labels_of(of.batch[self.mask[of.batch]]),
            objective=self._objective,
            random_seed=self._random_seed(of, _DROPOUT),
            smoothing=settings.label_smoothing,
        )

    def _labels_of(self, rows: Rows) -> Tensor:
        return to_device(self._labels[torch.from_numpy(rows)], self._device)

    def _draw_mixup(self, alpha: float, size: int, random_seed: int) -> tuple[float, Tensor]:
        """The weight lambda of every sample, and the samples that are mixed in (Zhang et al., arXiv 1710.09412)."""
        draw = np.random.default_rng(random_seed)
        return float(draw.beta(alpha, alpha)), to_device(torch.from_numpy(draw.permutation(size)), self._device)

    def _random_seed(self, of: PartRows, purpose: int) -> int:
        """A seed that is the same when a pass resumes, and another for every seed, epoch, step and part."""
        numbers = [self._data.seed, of.epoch, of.step, of.number, purpose]
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
