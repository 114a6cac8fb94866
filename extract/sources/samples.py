"""What every kind of source turns its data into: samples with ids and labels, in a train and perhaps a test list."""

import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from extract.config import DataConfig
from extract.images.decode import ENDINGS, decode_rgb, undecodable
from store.errors import JobError, Note, UserError

MOST_ENCODED_BYTES = 1 << 30  # of an image; Pillow's limit of pixels lets none be larger, not even uncompressed
TRAIN = "train"
TEST_NAMES = ("test", "val", "validation", "valid")
KNOWN_SPLITS = frozenset((TRAIN, *TEST_NAMES))


Clip = tuple[Image.Image, ...]  # the frames of a video sample, in order
Picture = Image.Image | Clip


@runtime_checkable
class Content(Protocol):
    """Where the image or clip of one sample is; read by several threads at once."""

    def decode(self, sample_id: str) -> Picture: ...

    def digest(self, sample_id: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded image in memory."""

    encoded: bytes

    def decode(self, sample_id: str) -> Image.Image:
        return decode_rgb(self.encoded, sample_id)

    def digest(self, sample_id: str) -> bytes:
        return content_digest(self.encoded)


@dataclass(frozen=True, slots=True)
class FileSlice:
    """An encoded image that fills a file, or `n_bytes` of it from `offset` on. The file is opened for each read."""

    path: str
    offset: int = 0
    n_bytes: int | None = None

    def decode(self, sample_id: str) -> Image.Image:
        return decode_rgb(self._read(sample_id), sample_id)

    def digest(self, sample_id: str) -> bytes:
        return content_digest(self._read(sample_id))

    def _read(self, sample_id: str) -> bytes:
        try:
            with Path(self.path).open("rb") as file:
                n_bytes = os.fstat(file.fileno()).st_size if self.n_bytes is None else self.n_bytes
                if n_bytes > MOST_ENCODED_BYTES:
                    raise undecodable(sample_id, ValueError(f"it has {n_bytes:,} bytes, more than 1 GiB"))
                file.seek(self.offset)
                encoded = file.read(n_bytes)
        except OSError as error:  # the listing found it, so this is the disk's fault and no sample to skip
            raise JobError(f"sample {sample_id!r} cannot be read from {self.path}: {error}") from error
        if self.n_bytes is not None and len(encoded) < self.n_bytes:
            raise JobError(f"sample {sample_id!r}: {self.path} is shorter than when it was listed; start again")
        return encoded


@dataclass(frozen=True)
class Medium:
    """What the files of a folder or of a list are.

    Attributes:
        noun: how messages call several.
        endings: of the files' names.
        content: from a path to the sample; with `start` and `end`, in seconds, to a part of it.
        has_parts: whether `content` takes these.
    """

    noun: str
    endings: frozenset[str]
    content: Callable[..., Content]
    has_parts: bool = False


IMAGES = Medium("images", ENDINGS, FileSlice)


def content_digest(encoded: bytes) -> bytes:
    """16 bytes."""
    return blake2b(encoded, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample; `labels` holds exactly one name unless the source is multi-label."""

    id: str
    labels: tuple[str, ...]
    content: Content
    part_of: str | None = None  # the id of the file that other samples may be parts of, too

    @property
    def file(self) -> str:
        """What no drawn split divides."""
        return self.part_of or self.id


@dataclass(frozen=True)
class Listing:
    """The samples of a source. `test` is None where it must be drawn from `train`; `classes` where labels decide."""

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample] | None
    classes: tuple[str, ...] | None = None
    multi_label: bool = False


def choose_test(splits: Collection[str], config: DataConfig) -> str | None:
    """Which of a source's own splits plays the test set; None if it must be drawn from the samples."""
    chosen = _find_test(splits, config)
    if unused := ", ".join(sorted(set(splits) - {TRAIN, chosen})):
        warnings.warn(
            f"{_place(config)}: {unused} is neither trained on nor tested; {TRAIN} is trained on, {chosen} is the test "
            f"set (data.test_split names another), and validation takes data.val_fraction of {TRAIN} (put samples "
            "there to use them)",
            Note,
            stacklevel=2,
        )
    return chosen


def _find_test(splits: Collection[str], config: DataConfig) -> str | None:
    wanted, found = config.test_split, ", ".join(sorted(splits))
    if not splits:
        if wanted is not None:
            raise UserError(f"data.test_split is {wanted!r}, but {_place(config)} has no splits; remove test_split")
        return None
    if TRAIN not in splits:
        raise UserError(f"{_place(config)} has the splits {found} but no {TRAIN!r}; rename the one to train on")
    if wanted is not None:
        if wanted not in splits or wanted == TRAIN:
            raise UserError(
                f"data.test_split is {wanted!r}, but the splits of {_place(config)} are {found}; name one beside train"
            )
        return wanted
    for name in TEST_NAMES:
        if name in splits:
            return name
    if len(splits) == 1:
        return None
    raise UserError(
        f"the splits of {_place(config)} are {found}, none named {', '.join(TEST_NAMES)}; "
        "set data.test_split to the one that plays the test set"
    )


def root_folder(config: DataConfig) -> Path:
    root = given_root(config)
    if not root.is_dir():
        raise UserError(f"data.root {root} is a file; source {config.source} wants a folder")
    return root


def root_file(config: DataConfig) -> Path:
    root = given_root(config)
    if root.is_dir():
        raise UserError(f"data.root {root} is a folder; source {config.source} wants the list itself, a file")
    return root


def given_root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError(f"source {config.source} needs data.root: the path of the data")
    if not config.root.exists():
        raise UserError(
            f"data.root {config.root} does not exist; check the path (relative ones start at the YAML file)"
        )
    return config.root


def _place(config: DataConfig) -> str:
    return f"source {config.source}" + ("" if config.root is None else f" at {config.root}")
