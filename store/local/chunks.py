"""Reads rows of uncompressed shards in a local folder directly into a batch.

A chunk is one row and its crc32c, which is checked before the row's first use in this process, and again after the
shard's file changed. Requested rows that are near each other in a shard are read by one call; a few rows between them
are read too and dropped. Files are read, not mapped: a mapped file that is cut short, or is on a failing disk, would
end the whole process.
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

_MAX_GAP = 3  # rows that are read and dropped; starting another read takes a disk longer
_MAX_CACHED_BYTES = 16 * 2**20  # of an array whose rows are cached
_MAX_SPAN = 128  # rows; with gaps and checksums at most 1,024 buffers, the limit of one preadv


class UnreadableError(Exception):
    """A shard is damaged, changed while it was read, or has its rows in another order."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `end` of a request that one call reads: they are at ascending places of one shard."""

    start: int
    end: int
    places: Sequence[int]


@dataclass(frozen=True)
class SelectedRows:
    """The requested rows of a split, and the spans to read from each shard."""

    rows: Int[np.ndarray, "rows"]
    spans: Mapping[int, Sequence[Span]]  # by shard

    @classmethod
    def of(cls, rows: Int[np.ndarray, "rows"], shard_samples: int) -> "SelectedRows":
        """Divide rows into spans as long as possible."""
        shards, places = np.divmod(rows, shard_samples)
        steps, numbers = np.diff(rows), np.arange(1, len(rows))
        breaks = (steps < 1) | (steps > 1 + _MAX_GAP) | (np.diff(shards) != 0)
        lengths = numbers - np.maximum.accumulate(np.where(breaks, numbers, 0))  # since the last break
        ends = numbers[breaks | (lengths % _MAX_SPAN == 0)]
        spans: dict[int, list[Span]] = {}
        shard_of_row, place_of_row = shards.tolist(), places.tolist()
        for start, end in pairwise([0, *ends.tolist(), len(rows)] if len(rows) else []):
            spans.setdefault(shard_of_row[start], []).append(Span(start, end, place_of_row[start:end]))
        return cls(rows, spans)


@dataclass(frozen=True)
class _Version:
    """A shard's file while it is unchanged; `checked` is 1 for every row whose checksum was compared."""

    stamp: Stamp
    checked: bytearray


class LocalChunks:
    """Reads rows of one array.

    Args:
        paths: the file of each shard.
        row_bytes: the size of a row without its checksum.
        cache_rows: read whole shards and cache all rows, unless the array is too large.
    """

    def __init__(
        self, files: OpenFiles, paths: Sequence[str], shards: Shards, row_bytes: int, cache_rows: bool = False
    ) -> None:
        self._files, self._paths, self._shards = files, paths, shards
        self._layout = PlainShard(shards.shard_samples, row_bytes)
        self._row_bytes, self._stride = row_bytes, self._layout.stride
        fits = shards.num_samples * row_bytes <= _MAX_CACHED_BYTES
        self._cache = np.empty((shards.num_samples, row_bytes), np.uint8) if cache_rows and fits else None
        self._versions: dict[int, _Version] = {}
        self._buffers = Buffers()

    def read(self, selected: SelectedRows) -> UInt8[np.ndarray, "rows n_bytes"]:
        """The selected rows, in the order of the request.

        Raises:
            OSError, UnreadableError: a file cannot be read here; tensorstore can read it, or says what is wrong.
        """
        out = self._buffers.lend(len(selected.rows) * self._row_bytes).reshape(-1, self._row_bytes)
        if self._cache is not None:
            self._take(self._cache, selected, out)
        else:
            for shard, spans in selected.spans.items():  # one open file at a time, since their number is limited
                self._read_shard(shard, spans, out)
        return out

    def _take(
        self, cache: UInt8[np.ndarray, "_ n_bytes"], selected: SelectedRows, out: UInt8[np.ndarray, "rows n_bytes"]
    ) -> None:
        before = {shard: self._open(shard)[1] for shard in selected.spans}
        np.take(cache, selected.rows, axis=0, out=out, mode="clip")  # any other mode copies first
        for shard, version in before.items():
            file, after = self._open(shard)
            if after.stamp != version.stamp:  # another thread has read it again in the meantime
                raise UnreadableError
            self._require_unchanged(shard, file, version)

    def _read_shard(self, shard: int, spans: Sequence[Span], out: UInt8[np.ndarray, "rows n_bytes"]) -> None:
        file, version = self._open(shard)
        memory, n_bytes, stride = out.reshape(-1).data, self._row_bytes, self._stride
        newly_checked: list[int] = []
        for span in spans:
            if span.end - span.start > 1 or not version.checked[span.places[0]]:
                newly_checked += self._fill(out[span.start : span.end], file, version, span.places)
                continue
            row = memory[span.start * n_bytes : span.end * n_bytes]
            if os.preadv(file.fd, [row], span.places[0] * stride) != n_bytes:
                raise UnreadableError
        self._require_unchanged(shard, file, version)
        for place in newly_checked:
            version.checked[place] = 1

    def _require_unchanged(self, shard: int, file: OpenFile, version: _Version) -> None:
        """Called after reading, so that it holds for everything that was read."""
        if file.stamp() != version.stamp:
            self._forget(shard)
            raise UnreadableError

    def _fill(
        self, out: UInt8[np.ndarray, "rows n_bytes"], file: OpenFile, version: _Version, places: Sequence[int]
    ) -> list[int]:
        """Read a span, and check rows that are read for the first time; returns their places."""
        crcs = self._read_span(file.fd, out, places)
        unchecked = [number for number, place in enumerate(places) if not version.checked[place]]
        for number in unchecked:
            if google_crc32c.value(out[number]) != int.from_bytes(crcs[number], "little"):
                raise UnreadableError
        return [places[number] for number in unchecked]

    def _read_span(self, fd: int, out: UInt8[np.ndarray, "rows n_bytes"], places: Sequence[int]) -> list[memoryview]:
        """Read rows at ascending places into `out` by one call; returns their checksums."""
        n_rows = places[-1] - places[0] + 1
        rows, dropped = dict(zip(places, out, strict=True)), bytearray(self._row_bytes if n_rows > len(places) else 0)
        checksums = memoryview(bytearray(CRC_BYTES * n_rows))
        crcs = [checksums[start : start + CRC_BYTES] for start in range(0, len(checksums), CRC_BYTES)]
        buffers: list[Any] = []
        for place, crc in zip(range(places[0], places[-1] + 1), crcs, strict=True):
            buffers += [rows.get(place, dropped), crc]
        if os.preadv(fd, buffers, places[0] * self._stride) != n_rows * self._stride:
            raise UnreadableError
        return [crcs[place - places[0]] for place in places]

    def _open(self, shard: int) -> tuple[OpenFile, _Version]:
        version = self._versions.get(shard)
        if version is None:
            self._files.forget(self._paths[shard])  # a file that is open already may have been replaced
        file = self._files.get(self._paths[shard])
        if version is None:
            version = self._versions[shard] = self._inspect(file, shard)
        return file, version

    def _inspect(self, file: OpenFile, shard: int) -> _Version:
        """Refuse a shard whose rows are not in order, without gaps; fills the cache, if any."""
        stamp, rows = file.stamp(), len(self._shards.rows(shard))
        index = np.empty(self._layout.index_bytes, np.uint8)
        _read_checked(file.fd, max(0, stamp[1] - len(index) - CRC_BYTES), index)
        if (index.view("<u8").reshape(-1, 2) != self._layout.index(rows))[:rows].any():
            raise UnreadableError
        if self._cache is not None:
            cached = self._shards.rows(shard)
            self._cache[cached.start : cached.stop] = self._read_whole(file, rows)
        return _Version(stamp, bytearray(rows))

    def _read_whole(self, file: OpenFile, rows: int) -> UInt8[np.ndarray, "rows n_bytes"]:
        whole = np.empty((rows, self._stride), np.uint8)
        if os.preadv(file.fd, [whole.data], 0) != whole.nbytes:
            raise UnreadableError
        values, crcs = whole[:, : self._row_bytes], whole[:, self._row_bytes :]
        for row, crc in zip(values, crcs, strict=True):
            if google_crc32c.value(row) != int.from_bytes(crc, "little"):
                raise UnreadableError
        return values

    def _forget(self, shard: int) -> None:
        self._versions.pop(shard, None)
        self._files.forget(self._paths[shard])


def _read_checked(fd: int, offset: int, into: UInt8[np.ndarray, "n_bytes"]) -> None:
    """Fill an array from an offset of a file, and compare the checksum that follows."""
    crc = bytearray(CRC_BYTES)
    if os.preadv(fd, (into.data, crc), offset) != len(into) + len(crc):
        raise UnreadableError
    if google_crc32c.value(into) != int.from_bytes(crc, "little"):
        raise UnreadableError
