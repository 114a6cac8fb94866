"""Chunks of uncompressed shards in a local folder, read straight into their place in a batch.

A chunk is one row and its crc32c, which is checked before the row's first use in this process, and again once the
shard's file has changed. Rows that are asked for one after the other, as they lie in a shard, are read at once; a few
that lie between them are read along and dropped. Files are read, not mapped: a mapped file that is cut short, or lies
on a disk that fails, ends the whole process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int, UInt8

from store.buffers import Buffers
from store.files import OpenFile, OpenFiles, Stamp
from store.layout import Shards

_CRC_BYTES = 4
_ENTRY_BYTES = 16  # of a shard's index: where a chunk starts, and its length
_LARGEST_GAP = 3  # rows; to begin another read takes a disk longer
_KEPT_BYTES = 16 * 2**20  # of an array of short rows: another read takes longer than they do
_LONGEST_RUN = 128  # rows; with those between them and all checksums, at most the 1,024 pieces that a call takes


class UnreadableError(Exception):
    """A shard that is damaged, or changed as it was read, or whose rows do not lie one after the other."""


@dataclass(frozen=True)
class Picked:
    """Rows of a split: the shard of each and its place there, and where the runs end that are read at once."""

    shards: Sequence[int]
    places: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, rows: Int[np.ndarray, "rows"], shard_samples: int) -> "Picked":
        """Places rise within a run."""
        shards, places = np.divmod(rows, shard_samples)
        steps, numbers = np.diff(rows), np.arange(1, len(rows))
        breaks = (steps < 1) | (steps > 1 + _LARGEST_GAP) | (np.diff(shards) != 0)
        lengths = numbers - np.maximum.accumulate(np.where(breaks, numbers, 0))  # since the last break
        ends = numbers[breaks | (lengths % _LONGEST_RUN == 0)]
        return cls(shards.tolist(), places.tolist(), [*ends.tolist(), len(rows)])


@dataclass(frozen=True)
class _Version:
    """A shard's file while nobody changes it; `checked` is 1 for every row whose checksum was found to be right.

    `kept` are all of its rows, where they are kept in memory.
    """

    stamp: Stamp
    checked: bytearray
    kept: UInt8[np.ndarray, "rows n_bytes"] | None = None


class LocalChunks:
    """The chunks of one array, whose shards lie at `paths`; a row takes `row_bytes`.

    Those of a small array of `short` rows are read a shard at a time, and kept.
    """

    def __init__(
        self, files: OpenFiles, paths: Sequence[str], shards: Shards, row_bytes: int, short: bool = False
    ) -> None:
        self._files, self._paths, self._shards = files, paths, shards
        self._keeps = short and shards.num_samples * row_bytes <= _KEPT_BYTES
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
        fresh = self._gather(out, opened, picked) if self._keeps else self._read_runs(out, opened, picked)
        for shard, (file, version) in opened.items():
            if file.stamp() != version.stamp:  # asked afterwards, so that the answer holds for all that was read
                self._forget(shard)
                raise UnreadableError
        for version, place in fresh:
            version.checked[place] = 1
        return out

    def _gather(
        self, out: UInt8[np.ndarray, "rows n_bytes"], opened: dict[int, tuple[OpenFile, _Version]], picked: Picked
    ) -> list[tuple[_Version, int]]:
        for row, shard, place in zip(out, picked.shards, picked.places, strict=True):
            row[:] = opened[shard][1].kept[place]  # type: ignore[index]
        return []

    def _read_runs(
        self, out: UInt8[np.ndarray, "rows n_bytes"], opened: dict[int, tuple[OpenFile, _Version]], picked: Picked
    ) -> list[tuple[_Version, int]]:
        """The places that had to be checked."""
        fresh, start = [], 0
        for end in picked.ends:
            file, version = opened[picked.shards[start]]
            fresh += self._fill(out[start:end], file, version, picked.places[start:end])
            start = end
        return fresh

    def _fill(
        self, out: UInt8[np.ndarray, "rows n_bytes"], file: OpenFile, version: _Version, places: Sequence[int]
    ) -> list[tuple[_Version, int]]:
        """Read a run; the places that had to be checked."""
        if len(places) == 1 and version.checked[places[0]]:
            if os.preadv(file.fd, [out.data], places[0] * self._stride) != self._row_bytes:
                raise UnreadableError
            return []
        crcs = self._read_along(file.fd, out, places)
        fresh = [number for number, place in enumerate(places) if not version.checked[place]]
        for number in fresh:
            if google_crc32c.value(out[number]) != int.from_bytes(crcs[number], "little"):
                raise UnreadableError
        return [(version, places[number]) for number in fresh]

    def _read_along(self, fd: int, out: UInt8[np.ndarray, "rows n_bytes"], places: Sequence[int]) -> list[memoryview]:
        """Rows of rising places into `out`, by one call; their checksums."""
        span = places[-1] - places[0] + 1
        rows, dropped = dict(zip(places, out, strict=True)), bytearray(self._row_bytes)
        checksums = memoryview(bytearray(_CRC_BYTES * span))
        crcs = [checksums[start : start + _CRC_BYTES] for start in range(0, len(checksums), _CRC_BYTES)]
        into: list[Any] = []
        for place, crc in zip(range(places[0], places[-1] + 1), crcs, strict=True):
            into += [rows.get(place, dropped), crc]
        if os.preadv(fd, into, places[0] * self._stride) != span * self._stride:
            raise UnreadableError
        return [crcs[place - places[0]] for place in places]

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
        return _Version(stamp, bytearray(rows), self._read_whole(file, rows) if self._keeps else None)

    def _read_whole(self, file: OpenFile, rows: int) -> UInt8[np.ndarray, "rows n_bytes"]:
        whole = np.empty((rows, self._stride), np.uint8)
        if os.preadv(file.fd, [whole.data], 0) != whole.nbytes:
            raise UnreadableError
        kept, crcs = np.ascontiguousarray(whole[:, : self._row_bytes]), whole[:, self._row_bytes :]
        if any(google_crc32c.value(row) != int.from_bytes(crc, "little") for row, crc in zip(kept, crcs, strict=True)):
            raise UnreadableError
        return kept

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
