"""Defines the samples that a source lists: each has an id, labels, and content that is decoded when it is needed."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from extract.images.decode import EXTENSIONS, decode_rgb, undecodable
from extract.sources.ignored_files import IgnoredFiles
from store.errors import JobError, UserError

MAX_FILE_BYTES = 1 << 30  # of an encoded image; Pillow's pixel limit allows no larger one, not even uncompressed

Clip = tuple[Image.Image, ...]  # the frames of a video sample, in order
DecodedSample = Image.Image | Clip


@runtime_checkable
class SampleContent(Protocol):
    """Where the image or clip of one sample is stored; several threads may read it at once."""

    def decode(self, sample_id: str) -> DecodedSample:
        """Upright RGB; raises DecodeError if the content is damaged."""
        ...

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the content."""
        ...


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes of an image file, in memory."""

    content: bytes

    def decode(self, sample_id: str) -> Image.Image:
        """Upright RGB; raises DecodeError if the bytes are damaged."""
        return decode_rgb(self.content, sample_id)

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the encoded image."""
        return content_digest(self.content)


@dataclass(frozen=True, slots=True)
class FileSlice:
    """An encoded image: a whole file, or `n_bytes` of it from `offset`. The file is opened for each read."""

    path: str
    offset: int = 0
    n_bytes: int | None = None

    def decode(self, sample_id: str) -> Image.Image:
        """Upright RGB; raises DecodeError if the bytes are damaged."""
        return decode_rgb(self._read(sample_id), sample_id)

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the encoded image."""
        return content_digest(self._read(sample_id))

    def _read(self, sample_id: str) -> bytes:
        try:
            with Path(self.path).open("rb") as file:
                n_bytes = os.fstat(file.fileno()).st_size if self.n_bytes is None else self.n_bytes
                if n_bytes > MAX_FILE_BYTES:
                    raise undecodable(sample_id, ValueError(f"it has {n_bytes:,} bytes, more than 1 GiB"))
                file.seek(self.offset)
                content = file.read(n_bytes)
        except OSError as error:  # the file was there when it was listed: a failure of the disk, no sample to skip
            raise JobError(f"sample {sample_id!r} cannot be read from {self.path}: {error}") from error
        if self.n_bytes is not None and len(content) < self.n_bytes:
            raise JobError(f"sample {sample_id!r}: {self.path} is shorter than when it was listed; start again")
        return content


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """The kind of files that a folder or a table lists: images or videos.

    Attributes:
        plural: the word for several of them in messages.
        extensions: of the file names, in lower case, with the dot.
        content: builds a sample's content from a path; with `start` and `end`, in seconds, from a part of the file.
        has_parts: whether `content` takes `start` and `end`.
    """

    plural: str
    extensions: frozenset[str]
    content: Callable[..., SampleContent]
    has_parts: bool = False

    def includes(self, name: str) -> bool:
        """Whether a file name has one of the extensions."""
        return os.path.splitext(name)[1].lower() in self.extensions  # noqa: PTH122 (called for every file)

    def warn_of_others(self, ignored: IgnoredFiles, place: object) -> None:
        """Warn of files with other extensions that are ignored at a place, if there are any."""
        ignored.warn(place, f"extensions other than those of {self.plural}")

    def none_in(self, place: str, remedy: str, others: IgnoredFiles) -> UserError:
        """The error for a place without any such file."""
        return UserError(
            f"{place} holds no {self.plural}; {remedy} (extensions: {' '.join(sorted(self.extensions))})"
            f"{f'. Its files: {others}' if others else ''}"
        )


IMAGES = FileKind(plural="images", extensions=EXTENSIONS, content=FileSlice)


def content_digest(content: bytes) -> bytes:
    """16 bytes of blake2b."""
    return blake2b(content, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample; `labels` holds exactly one name unless the source is multi-label."""

    id: str
    labels: tuple[str, ...]
    content: SampleContent
    part_of: str | None = None  # the id of the file, if other samples may be parts of it, too

    @property
    def file(self) -> str:
        """The id of the sample's file: samples of one file are drawn into the same split."""
        return self.part_of or self.id


@dataclass(frozen=True, kw_only=True)
class SourceSamples:
    """All samples of a source.

    Attributes:
        name: of the data set, for the store and the report.
        train: the samples to train on.
        test: the samples of the test split; None if it must be drawn from `train`.
        validation: the samples of the source's own validation split; empty if validation is drawn from `train`.
        classes: class names in order of their index; None if they are derived from the labels.
        multi_label: whether a sample may have several labels.
    """

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample] | None
    validation: Sequence[Sample] = ()
    classes: tuple[str, ...] | None = None
    multi_label: bool = False
