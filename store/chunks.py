"""Chunks of uncompressed shards in a local folder, read straight into their place in a batch.

A chunk is one row and its crc32c, which is checked before the row's first use in this process, and again once the
shard's file has changed. Files are read, not mapped: a mapped file that is cut short, or lies on a disk that fails,
ends the whole process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
from jaxtyping import Int, UInt8

from store.buffers import Buffers
from store.files import OpenFile, OpenFiles, Stamp
from store.layout import Shards

_CRC_BYTES = 4
_ENTRY_BYTES = 16  # of a shard's index: where a chunk starts, and its length


class UnreadableError(Exception):
    """A shard that is damaged, or changed as it was read, or whose rows do not lie one after the other."""


@dataclass(frozen=True)
class Picked:
    """Rows of a split: the shard of each, and its place there."""

    shards: Sequence[int]
    places: Sequence[int]

    @classmethod
    def of(cls, rows: Int[np.ndarray, "rows"], shard_samples: int) -> "Picked":
        shards, places = np.divmod(rows, shard_samples)
        return cls(shards.tolist(), places.tolist())


@dataclass(frozen=True)
class _Version:
    """A shard's file while nobody changes it; `checked` is 1 for every row whose checksum was found to be right."""

    stamp: Stamp
    checked: bytearray


class LocalChunks:
    """The chunks of one array, whose shards lie at `paths`; a row takes `row_bytes`."""

    def __init__(self, files: OpenFiles, paths: Sequence[str], shards: Shards, row_bytes: int) -> None:
        self._files, self._paths, self._shards = files, paths, shards
        self._row_bytes, self._stride = row_bytes, row_bytes + _CRC_BYTES
        starts = np.arange(shards.shard_samples, dtype="<u8") * self._stride
        self._index = np.stack([starts, np.full_like(starts, self._stride)], axis=1)
        self._versions: dict[int, _Version] = {}
        self._buffers = Buffers()

    def read(self, picked: Picked) -> UInt8[np.ndarray, "rows n_bytes"]:
        """Some rows, in their order.

        Raises:
            OSError, UnreadableError: another reader should look at it, and can say what is wrong.
        """
        opened = {shard: self._open(shard) for shard in set(picked.shards)}
        out = self._buffers.lend(len(picked.places) * self._row_bytes).reshape(-1, self._row_bytes)
        fresh = self._fill(out, [opened[shard] for shard in picked.shards], picked.places)
        for shard, (file, version) in opened.items():
            if file.stamp() != version.stamp:  # asked afterwards, so that the answer holds for all that was read
                self._forget(shard)
                raise UnreadableError
        for version, place in fresh:
            version.checked[place] = 1
        return out

    def _fill(
        self, out: UInt8[np.ndarray, "rows n_bytes"], opened: Sequence[tuple[OpenFile, _Version]], places: Sequence[int]
    ) -> list[tuple[_Version, int]]:
        """The rows that had to be checked."""
        n_bytes, stride, fresh = self._row_bytes, self._stride, []
        for row, (file, version), place in zip(out, opened, places, strict=True):
            if not version.checked[place]:
                _read_checked(file.fd, place * stride, row)
                fresh.append((version, place))
            elif os.preadv(file.fd, (row,), place * stride) != n_bytes:
                raise UnreadableError
        return fresh

    def _open(self, shard: int) -> tuple[OpenFile, _Version]:
        file = self._files.get(self._paths[shard])
        version = self._versions.get(shard)
        if version is None:
            version = self._versions[shard] = self._inspect(file, shard)
        return file, version

    def _inspect(self, file: OpenFile, shard: int) -> _Version:
        """Refuse a shard whose rows do not lie one after the other."""
        stamp, rows = file.stamp(), len(self._shards.rows(shard))
        index = np.empty(_ENTRY_BYTES * self._shards.shard_samples, np.uint8)
        _read_checked(file.fd, max(0, stamp[1] - len(index) - _CRC_BYTES), index)
        if (index.view("<u8").reshape(-1, 2) != self._index)[:rows].any():
            raise UnreadableError
        return _Version(stamp, bytearray(rows))

    def _forget(self, shard: int) -> None:
        self._versions.pop(shard, None)
        self._files.forget(self._paths[shard])


def _read_checked(fd: int, offset: int, into: UInt8[np.ndarray, "n_bytes"]) -> None:
    """Fill an array with what lies at an offset, where the checksum that follows is right."""
    crc = bytearray(_CRC_BYTES)
    if os.preadv(fd, (into.data, crc), offset) != len(into) + len(crc):
        raise UnreadableError
    if google_crc32c.value(into) != int.from_bytes(crc, "little"):
        raise UnreadableError
