"""Wraps a user's own map-style datasets as a source."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from extract.images.decode import to_rgb
from extract.sources.open_source import ImageSource
from store.errors import UserError


class DatasetSplit:
    """An ImageSplit over a map-style dataset of (sample, label) pairs; samples are images or backbone inputs."""

    validation: Bool[np.ndarray, "samples"] | None = None

    def __init__(self, name: str, dataset: Any, num_classes: int) -> None:
        self._dataset = dataset
        self.ids: Sequence[str] = [f"{name}/{row:08d}" for row in range(len(dataset))]
        pairs = zip(self.ids, (dataset[row] for row in range(len(dataset))), strict=True)
        labels = [_label_of(pair, sample_id, num_classes) for sample_id, pair in pairs]
        if len({label.ndim for label in labels}) != 1:
            raise UserError(f"the labels of {name} are class indices in some samples and 0/1 vectors in others")
        self.labels: np.ndarray = np.stack(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Any:
        sample = self._dataset[row][0]
        return to_rgb(sample, self.ids[row]) if isinstance(sample, Image.Image) else sample

    def digest(self, row: int) -> bytes:
        """16 bytes of blake2b over the sample's pixels or values."""
        sample = self._dataset[row][0]
        mode = sample.mode if isinstance(sample, Image.Image) else ""
        values = np.asarray(sample.convert("RGBA") if mode in ("P", "PA") else sample)
        digest = hashlib.blake2b(f"{mode} {values.shape} {values.dtype}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()


def _label_of(pair: Any, sample_id: str, num_classes: int) -> np.ndarray:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise UserError(f"sample {sample_id} is {type(pair).__name__}; a dataset must yield (sample, label) pairs")
    label = np.asarray(pair[1])
    if label.ndim == 0 and np.issubdtype(label.dtype, np.integer) and 0 <= label < num_classes:
        return label.astype(np.int64)
    if label.shape == (num_classes,) and label.dtype.kind in "biuf" and np.isin(label, (0, 1)).all():
        return label.astype(np.uint8)
    raise UserError(
        f"the label of {sample_id} is {pair[1]!r}; legal: a class index from 0 to {num_classes - 1}, "
        f"or {num_classes} numbers, each 0 or 1"
    )


def from_datasets(datasets: Mapping[str, Any], classes: Sequence[str], name: str = "dataset") -> ImageSource:
    """A source from your own map-style datasets, to pass to `extract`, `train` and `run`.

    Args:
        datasets: `train` and `test`, each a `torch.utils.data.Dataset` of (image or tensor, label) pairs; a label is a
            class index, or a 0/1 vector over the classes.
        classes: class names; a label is an index into them.
        name: of the data set, for the store and the report.

    Raises:
        UserError: a split is missing or empty, or a label is outside the range.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> import sidecache as sc
        >>> pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        >>> pairs = [(Image.fromarray(image), row % 2) for row, image in enumerate(pixels)]
        >>> source = sc.from_datasets({"train": pairs[:4], "test": pairs[4:]}, classes=["cat", "dog"])
        >>> source.splits["test"].ids
        ['test/00000000', 'test/00000001']
        >>> source.splits["train"].labels.tolist()
        [0, 1, 0, 1]
        >>> source.splits["train"][0].size
        (32, 32)
    """
    if set(datasets) != {"train", "test"} or not all(len(dataset) for dataset in datasets.values()):
        sizes = {split: len(dataset) for split, dataset in datasets.items()}
        raise UserError(f"datasets must be a non-empty `train` and a non-empty `test`, got {sizes}")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"classes must be at least two different names, got {list(classes)}")
    splits = {split: DatasetSplit(split, dataset, len(classes)) for split, dataset in datasets.items()}
    if len({split.labels.ndim for split in splits.values()}) != 1:
        raise UserError("the labels of train and test are of two kinds: class indices in one, 0/1 vectors in the other")
    multi_label = splits["train"].labels.ndim == 2
    return ImageSource(name=name, classes=tuple(classes), multi_label=multi_label, splits=splits)
