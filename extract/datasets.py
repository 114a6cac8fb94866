"""A user's own datasets as a source."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from extract.sources import ImageSource
from store.errors import UserError


class DatasetSplit:
    """A map-style dataset of (sample, label) pairs, read through the backbone's own transform."""

    def __init__(self, name: str, dataset: Any, num_classes: int) -> None:
        self._dataset = dataset
        self.ids: Sequence[str] = [f"{name}/{row:08d}" for row in range(len(dataset))]
        labels = [np.asarray(dataset[row][1]) for row in range(len(dataset))]
        self.labels: np.ndarray = np.stack(labels).astype(np.uint8 if labels[0].ndim else np.int64)
        if self.labels.ndim == 1:
            _check_range(self.labels.tolist(), self.ids, num_classes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Any:
        return self._dataset[row][0]

    def digest(self, row: int) -> bytes:
        """16 bytes that stand for the sample's content."""
        sample = self._dataset[row][0]
        values = np.asarray(sample.convert("RGBA") if isinstance(sample, Image.Image) else sample)
        digest = hashlib.blake2b(f"{values.shape} {values.dtype}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()


def _check_range(labels: Sequence[int], ids: Sequence[str], num_classes: int) -> None:
    for label, sample_id in zip(labels, ids, strict=True):
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} of {sample_id} is outside the range 0 to {num_classes - 1}")


def from_datasets(datasets: Mapping[str, Any], classes: Sequence[str], name: str = "dataset") -> ImageSource:
    """A source from map-style datasets.

    Args:
        datasets: `train` and `test`, each a `torch.utils.data.Dataset` of (image or tensor, label) pairs; a label is a
            class index, or a 0/1 vector over the classes.
        classes: class names; a label is an index into them.
        name: how reports call it.

    Raises:
        UserError: a split is missing or empty, or a label is outside the range.
    """
    if set(datasets) != {"train", "test"} or not all(len(dataset) for dataset in datasets.values()):
        sizes = {split: len(dataset) for split, dataset in datasets.items()}
        raise UserError(f"datasets must be a non-empty `train` and a non-empty `test`, got {sizes}")
    splits = {split: DatasetSplit(split, dataset, len(classes)) for split, dataset in datasets.items()}
    return ImageSource(name, tuple(classes), splits["train"].labels.ndim == 2, splits)
