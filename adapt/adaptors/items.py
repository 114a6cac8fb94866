"""Turns what a user wants classified, paths, PIL images and arrays in any mix, into samples."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image

from extract.config import ClipConfig
from extract.images.decode import DecodeError, to_rgb
from extract.sources.samples import IMAGES, FileKind, Sample, content_digest
from extract.sources.videos import video_kind
from store.errors import UserError

Items = object  # an item or an iterable of them; anything else is refused with a message, so no type is required

_LEGAL = "legal: paths, PIL images, and arrays (height, width, 3) of uint8"
_CONVERTING = Lock()  # an image may be given twice, and Pillow loads it when it is first read


@dataclass(frozen=True, slots=True)
class PixelsInMemory:
    """An image that the caller has in memory."""

    image: Image.Image

    def decode(self, sample_id: str) -> Image.Image:
        """Upright RGB; raises DecodeError if the pixels cannot be read."""
        with _CONVERTING:
            return to_rgb(self.image, sample_id)

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the pixels."""
        return content_digest(self.decode(sample_id).tobytes())


@dataclass(frozen=True, kw_only=True)
class GivenItems:
    """What is to be classified, in the order of the user.

    Attributes:
        names: of all items.
        samples: position -> sample, of those that are there.
        failed: position -> why a file cannot be read.
        views: of every sample.
    """

    names: tuple[str, ...]
    samples: dict[int, Sample]
    failed: dict[int, str]
    views: int


def kind_of_files(clips: ClipConfig | None) -> FileKind:
    """The files that an adaptor takes; raises what `video_kind` raises."""
    return video_kind(clips) if clips else IMAGES


def read_items(items: Items, clips: ClipConfig | None) -> GivenItems:
    """List items; files are decoded later.

    Args:
        items: one or several.
        clips: how videos are sampled; None for images.

    Raises:
        UserError: an item is neither a path nor an image.
    """
    names, samples, failed = list[str](), dict[int, Sample](), dict[int, str]()
    kind = kind_of_files(clips)
    for number, item in enumerate(_as_list(items)):
        try:
            names.append(_name(item, number))
            samples[number] = _to_sample(item, names[-1], kind)
        except DecodeError as error:
            failed[number] = str(error)
    return GivenItems(names=tuple(names), samples=samples, failed=failed, views=clips.views if clips else 1)


def _as_list(items: Items) -> list[object]:
    if isinstance(items, torch.Tensor):
        raise UserError(f"a tensor is no picture; give preprocessed tensors to `probabilities` or `logits`; {_LEGAL}")
    is_one = isinstance(items, str | os.PathLike | Image.Image | np.ndarray)
    return list(items) if isinstance(items, Iterable) and not is_one else [items]


def _name(item: object, number: int) -> str:
    return os.fspath(item) if isinstance(item, str | os.PathLike) else f"image {number}"


def _to_sample(item: object, name: str, kind: FileKind) -> Sample:
    if isinstance(item, str | os.PathLike):
        _require_readable(name)
        return Sample(name, (), kind.content(name))
    if not isinstance(item, Image.Image | np.ndarray):
        raise UserError(f"{name} is of type {type(item).__name__}; {_LEGAL}")
    if kind is not IMAGES:
        raise UserError(f"{name} is a picture, but the adaptor was trained on clips; give the paths of videos")
    return Sample(name, (), PixelsInMemory(_to_image(item, name) if isinstance(item, np.ndarray) else item))


def _to_image(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{name} is an array of shape {pixels.shape} and type {pixels.dtype}; {_LEGAL}")
    return Image.fromarray(pixels)


def _require_readable(file: str) -> None:
    """Raise a DecodeError for a file that is not there: the others may be classified without it."""
    try:
        mode = Path(file).stat().st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(file, error.strerror if isinstance(error, OSError) else error) from error
    if not stat.S_ISREG(mode):
        raise _unreadable(file, "Is a directory" if stat.S_ISDIR(mode) else "it is no regular file")
    if not os.access(file, os.R_OK):
        raise _unreadable(file, "Permission denied")


def _unreadable(file: str, reason: object) -> DecodeError:
    return DecodeError(f"cannot read {file}: {reason}")
