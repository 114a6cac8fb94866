"""Chunks of uncompressed shards in a local folder, read straight into their place in a batch.

A chunk is one row and its crc32c, which is checked before the row's first use in this process, and again once the
shard's file has changed. Rows that are asked for one after the other, as they lie in a shard, are read at once; a few
that lie between them are read along and dropped. Files are read, not mapped: a mapped file that is cut short, or lies
on a disk that fails, ends the whole process.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int, UInt8

from store.layout import Shards
from store.local.buffers import Buffers
from store.local.open_files import OpenFile, OpenFiles, Stamp
from store.local.plain_shard import CRC_BYTES, PlainShard

_LARGEST_GAP = 3  # rows; to begin another read takes a disk longer
_KEPT_BYTES = 16 * 2**20  # of an array of short rows: another read takes longer than they do
_LONGEST_RUN = 128  # rows; with those between them and all checksums, at most the 1,024 pieces that a call takes


class UnreadableError(Exception):
    """A shard that is damaged, or changed as it was read, or whose rows do not lie one after the other."""


@dataclass(frozen=True)
class Run:
    """Rows start ... end of a request, at rising places of a shard, which are read at once."""

    start: int
    end: int
    places: Sequence[int]


@dataclass(frozen=True)
class Picked:
    """Rows of a split, by the shards that they lie in."""

    rows: Int[np.ndarray, "rows"]
    runs: Mapping[int, Sequence[Run]]

    @classmethod
    def of(cls, rows: Int[np.ndarray, "rows"], shard_samples: int) -> "Picked":
        """Runs as long as can be."""
        shards, places = np.divmod(rows, shard_samples)
        steps, numbers = np.diff(rows), np.arange(1, len(rows))
        breaks = (steps < 1) | (steps > 1 + _LARGEST_GAP) | (np.diff(shards) != 0)
        lengths = numbers - np.maximum.accumulate(np.where(breaks, numbers, 0))  # since the last break
        ends = numbers[breaks | (lengths % _LONGEST_RUN == 0)]
        runs: dict[int, list[Run]] = {}
        by_row, in_shard = shards.tolist(), places.tolist()
        for start, end in pairwise([0, *ends.tolist(), len(rows)] if len(rows) else []):
            runs.setdefault(by_row[start], []).append(Run(start, end, in_shard[start:end]))
        return cls(rows, runs)


@dataclass(frozen=True)
class _Version:
    """A shard's file while nobody changes it; `checked` is 1 for every row whose checksum was found to be right."""

    stamp: Stamp
    checked: bytearray


class LocalChunks:
    """The chunks of one array, whose shards lie at `paths`; a row takes `row_bytes`.

    Those of a small array of `short` rows are read a shard at a time, and kept.
    """

    def __init__(
        self, files: OpenFiles, paths: Sequence[str], shards: Shards, row_bytes: int, short: bool = False
    ) -> None:
        self._files, self._paths, self._shards = files, paths, shards
        self._layout = PlainShard(shards.shard_samples, row_bytes)
        self._row_bytes, self._stride = row_bytes, self._layout.stride
        keeps = short and shards.num_samples * row_bytes <= _KEPT_BYTES
        self._kept = np.empty((shards.num_samples, row_bytes), np.uint8) if keeps else None
        self._versions: dict[int, _Version] = {}
        self._buffers = Buffers()

    def read(self, picked: Picked) -> UInt8[np.ndarray, "rows n_bytes"]:
        """Some rows, in their order.

        Raises:
            OSError, UnreadableError: another reader should look at it, and can say what is wrong.
        """
        out = self._buffers.lend(len(picked.rows) * self._row_bytes).reshape(-1, self._row_bytes)
        if self._kept is not None:
            self._take(self._kept, picked, out)
        else:
            for shard, runs in picked.runs.items():  # one file open at a time: a process may have only so many
                self._read_shard(shard, runs, out)
        return out

    def _take(
        self, kept: UInt8[np.ndarray, "_ n_bytes"], picked: Picked, out: UInt8[np.ndarray, "rows n_bytes"]
    ) -> None:
        before = {shard: self._open(shard)[1] for shard in picked.runs}
        np.take(kept, picked.rows, axis=0, out=out, mode="clip")  # any other mode makes a copy first
        for shard, version in before.items():
            file, after = self._open(shard)
            if after.stamp != version.stamp:  # another thread has read it anew meanwhile
                raise UnreadableError
            self._require_unchanged(shard, file, version)

    def _read_shard(self, shard: int, runs: Sequence[Run], out: UInt8[np.ndarray, "rows n_bytes"]) -> None:
        file, version = self._open(shard)
        memory, n_bytes, stride = out.reshape(-1).data, self._row_bytes, self._stride
        fresh: list[int] = []
        for run in runs:
            if run.end - run.start > 1 or not version.checked[run.places[0]]:
                fresh += self._fill(out[run.start : run.end], file, version, run.places)
                continue
            row = memory[run.start * n_bytes : run.end * n_bytes]
            if os.preadv(file.fd, [row], run.places[0] * stride) != n_bytes:
                raise UnreadableError
        self._require_unchanged(shard, file, version)
        for place in fresh:
            version.checked[place] = 1

    def _require_unchanged(self, shard: int, file: OpenFile, version: _Version) -> None:
        """Asked after reading, so that the answer holds for all that was read."""
        if file.stamp() != version.stamp:
            self._forget(shard)
            raise UnreadableError

    def _fill(
        self, out: UInt8[np.ndarray, "rows n_bytes"], file: OpenFile, version: _Version, places: Sequence[int]
    ) -> list[int]:
        """Read a run; the places that had to be checked."""
        crcs = self._read_along(file.fd, out, places)
        fresh = [number for number, place in enumerate(places) if not version.checked[place]]
        for number in fresh:
            if google_crc32c.value(out[number]) != int.from_bytes(crcs[number], "little"):
                raise UnreadableError
        return [places[number] for number in fresh]

    def _read_along(self, fd: int, out: UInt8[np.ndarray, "rows n_bytes"], places: Sequence[int]) -> list[memoryview]:
        """Rows of rising places into `out`, by one call; their checksums."""
        span = places[-1] - places[0] + 1
        rows, dropped = dict(zip(places, out, strict=True)), bytearray(self._row_bytes if span > len(places) else 0)
        checksums = memoryview(bytearray(CRC_BYTES * span))
        crcs = [checksums[start : start + CRC_BYTES] for start in range(0, len(checksums), CRC_BYTES)]
        into: list[Any] = []
        for place, crc in zip(range(places[0], places[-1] + 1), crcs, strict=True):
            into += [rows.get(place, dropped), crc]
        if os.preadv(fd, into, places[0] * self._stride) != span * self._stride:
            raise UnreadableError
        return [crcs[place - places[0]] for place in places]

    def _open(self, shard: int) -> tuple[OpenFile, _Version]:
        version = self._versions.get(shard)
        if version is None:
            self._files.forget(self._paths[shard])  # what another reader has open may have been replaced since
        file = self._files.get(self._paths[shard])
        if version is None:
            version = self._versions[shard] = self._inspect(file, shard)
        return file, version

    def _inspect(self, file: OpenFile, shard: int) -> _Version:
        """Refuse a shard whose rows do not lie one after the other."""
        stamp, rows = file.stamp(), len(self._shards.rows(shard))
        index = np.empty(self._layout.index_bytes, np.uint8)
        _read_checked(file.fd, max(0, stamp[1] - len(index) - CRC_BYTES), index)
        if (index.view("<u8").reshape(-1, 2) != self._layout.index(rows))[:rows].any():
            raise UnreadableError
        if self._kept is not None:
            kept = self._shards.rows(shard)
            self._kept[kept.start : kept.stop] = self._read_whole(file, rows)
        return _Version(stamp, bytearray(rows))

    def _read_whole(self, file: OpenFile, rows: int) -> UInt8[np.ndarray, "rows n_bytes"]:
        whole = np.empty((rows, self._stride), np.uint8)
        if os.preadv(file.fd, [whole.data], 0) != whole.nbytes:
            raise UnreadableError
        found, crcs = whole[:, : self._row_bytes], whole[:, self._row_bytes :]
        if any(google_crc32c.value(row) != int.from_bytes(crc, "little") for row, crc in zip(found, crcs, strict=True)):
            raise UnreadableError
        return found

    def _forget(self, shard: int) -> None:
        self._versions.pop(shard, None)
        self._files.forget(self._paths[shard])


def _read_checked(fd: int, offset: int, into: UInt8[np.ndarray, "n_bytes"]) -> None:
    """Fill an array with what lies at an offset, where the checksum that follows is right."""
    crc = bytearray(CRC_BYTES)
    if os.preadv(fd, (into.data, crc), offset) != len(into) + len(crc):
        raise UnreadableError
    if google_crc32c.value(into) != int.from_bytes(crc, "little"):
        raise UnreadableError
