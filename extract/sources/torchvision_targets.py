"""Reads the labels and class names of a torchvision data set, which has them in one of several attributes."""

from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from store.errors import UserError

Targets = Int64[np.ndarray, "samples"] | Int64[np.ndarray, "samples classes"]

_TARGETS = ("targets", "labels", "_labels", "attr", "y")


def read_targets(class_name: str, dataset: Any) -> Targets:
    """The labels of all samples: class indices, or one 0/1 column for each class.

    Raises:
        UserError: the data set is empty or does not hold class labels.
    """
    _check_items(class_name, dataset)
    targets = np.asarray(_raw_targets(dataset))
    if not len(dataset):
        raise UserError(f"torchvision.datasets.{class_name} is empty; check its files")
    if targets.dtype.kind not in "iub" or targets.ndim > 2 or (targets.ndim == 2 and targets.max() > 1):
        raise UserError(f"torchvision.datasets.{class_name} has no class labels; use one for classification")
    if targets.min() < 0:
        raise UserError(
            f"torchvision.datasets.{class_name} has the label {targets.min()}: unlabeled; use another split"
        )
    return targets.astype(np.int64)


def _check_items(class_name: str, dataset: Any) -> None:
    try:
        item = dataset[0]
    except Exception:  # a damaged first image is reported or skipped when it is extracted
        return
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], Image.Image):
        raise UserError(f"torchvision.datasets.{class_name} does not yield (image, label) pairs; use another source")


def _raw_targets(dataset: Any) -> Any:
    for name in _TARGETS:
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            return found
    pairs = getattr(dataset, "_samples", None)
    if pairs is not None and len(pairs) == len(dataset):
        return [label for _, label in pairs]
    return [dataset[row][1] for row in range(len(dataset))]


def class_names(dataset: Any, targets: Targets) -> tuple[str, ...] | None:
    """Class names in order of their index; None if the data set has no names, so that the labels serve as names."""
    n_classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    for attribute in ("classes", "categories", "attr_names"):
        names = [_as_text(name) for name in getattr(dataset, attribute, None) or ()]
        names = [name for name in names if name]  # CelebA's header ends in an empty one
        if len(names) >= n_classes:
            return tuple(f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names))
    return tuple(str(k) for k in range(n_classes)) if targets.ndim == 2 else None


def _as_text(name: Any) -> str:
    """ImageNet gives each class as a tuple of synonyms."""
    return ", ".join(name) if isinstance(name, tuple) else str(name)
