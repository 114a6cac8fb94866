"""Lists augmented views of training images: each is a random crop, perhaps flipped, that the id of its sample draws.

A view depends on the seed, the id of its sample and its number alone: neither the order and the number of the samples
nor the process that reads it changes it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from extract.config import DataConfig
from extract.sources.open_source import ImageSource, ImageSplit, SampleSplit
from store.errors import UserError
from store.schema import AUGMENTED

VERSION = 1  # raise it with any change of the draw


@dataclass(frozen=True)
class AugmentedImage:
    """An image of which an augmented view is wanted; equal seeds give equal views."""

    image: Image.Image
    seed: int


class AugmentedSplit:
    """An ImageSplit of the augmented views of another one: `views` rows for each of its rows.

    Args:
        split: of images.
        views: of every image.
        seed: another one draws other views.
    """

    validation: Bool[np.ndarray, "samples"] | None = None

    def __init__(self, split: ImageSplit, views: int, seed: int) -> None:
        self._split, self._views, self._seed = split, views, seed
        self.ids: Sequence[str] = tuple(f"{sample}#{view}" for sample in split.ids for view in range(1, views + 1))
        self.labels: Any = np.repeat(np.asarray(split.labels), views, axis=0)

    def of(self, split: ImageSplit) -> "AugmentedSplit":
        """The same views of the images of another split."""
        return AugmentedSplit(split, self._views, self._seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> AugmentedImage:
        """The image, with the seed of the view; raises DecodeError if it is damaged, UserError if it is no image."""
        image = _require_image(self._split[row // self._views], self.ids[row])
        digest = blake2b(f"{self._seed} {self.ids[row]}".encode(), digest_size=16).digest()
        return AugmentedImage(image, int.from_bytes(digest))

    def digest(self, row: int) -> bytes:
        """16 bytes that identify the content of the image; the same for all its views."""
        return self._split.digest(row // self._views)


def with_views(source: ImageSource, config: DataConfig) -> ImageSource:
    """A source with the split `augmented`, if `data.views` asks for more views than the plain one.

    Raises:
        UserError: its samples are no images.
    """
    if config.views == 1:
        return source
    train = source.splits["train"]
    if source.is_decoded_here or not isinstance(train, SampleSplit):  # samples of the user, which may be anything
        _require_image(train[0], train.ids[0])
    augmented = AugmentedSplit(train, config.views - 1, config.split_seed)
    return replace(source, splits={**source.splits, AUGMENTED: augmented}, augmentation=describe_augmentation(config))


def describe_augmentation(config: DataConfig) -> str:
    """All settings that determine the augmented views, as JSON; empty if there are none."""
    if config.views == 1:
        return ""
    return json.dumps({"version": VERSION, "views": config.views, "seed": config.split_seed})


def _require_image(sample: Any, sample_id: str) -> Image.Image:
    if not isinstance(sample, Image.Image):
        raise UserError(
            f"data.views asks for random crops of images, but the sample {sample_id!r} is of type "
            f"{type(sample).__name__}; set data.views to 1, or let the dataset give PIL images"
        )
    return sample
