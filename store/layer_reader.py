"""Reads rows of one layer: local uncompressed files directly, all others through tensorstore."""

import math
import os
import re
import resource
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int

from store.address import local_path
from store.array_io import open_array
from store.arrays import holds_plain_rows, layer_arrays, shard_arrays, shard_file
from store.dtypes import Encoded
from store.errors import JobError
from store.io_errors import OutageError
from store.kvstore import KeyValueStore, wait
from store.local.chunks import LocalChunks, SelectedRows, UnreadableError
from store.local.open_files import OpenFiles
from store.schema import Schema

# Concurrent reads: from the page cache more threads only contend for the GIL, a disk would like a few more.
_MAX_THREADS = min(8, 2 * (os.cpu_count() or 1))
_MAX_OPEN_FILES = 4096
_SHARD_OF_FILE = re.compile(r"/c/(\d+)[/\"]")  # in the name of a file in tensorstore's errors


class LayerReader:
    """Reads one layer of a split: its values and, for int8, their scales.

    Attributes:
        has_grown: whether the store has more samples than the schema says.

    Raises:
        JobError: the metadata of its arrays are damaged, or do not fit the schema.
    """

    def __init__(self, kvstore: KeyValueStore, schema: Schema, split: str, layer: int) -> None:
        expected = {name: shard_arrays(schema, split)[name] for name in layer_arrays(schema, layer)}
        self._kvstore, self._checked_shards = kvstore, set[int]()
        self._shards, self._compressed = schema.shards(split), schema.compressor is not None
        self._metadata = {f"{split}/{name}": metadata for name, metadata in expected.items()}
        self._arrays = [
            open_array(kvstore, path, metadata, may_be_longer=True) for path, metadata in self._metadata.items()
        ]
        self.has_grown = any(array.shape[0] > schema.splits[split].num_samples for array in self._arrays)
        self._local: list[LocalChunks] = []
        if holds_plain_rows(kvstore, schema) and self._has_expected_codecs():
            self._local = [self._local_chunks(path, metadata) for path, metadata in self._metadata.items()]

    def fetch(self, rows: Int[np.ndarray, "rows"], selected: SelectedRows) -> Any:
        """A future of the stored values of some rows, one array for each array of the layer."""
        if self._local and rows.size:
            return _threads().submit(self._read_local, rows, selected)
        self._require_regular(selected.spans.keys())
        return self._read_tensorstore(rows)

    def _read_local(self, rows: Int[np.ndarray, "rows"], selected: SelectedRows) -> Sequence[np.ndarray]:
        try:
            self._require_regular(selected.spans.keys())
            parts = [chunks.read(selected) for chunks in self._local]
        except (OSError, UnreadableError):
            self._checked_shards -= selected.spans.keys()  # a file may have been replaced
            self._require_regular(selected.spans.keys())
            return self._read_tensorstore(rows).result()  # reads it after all, or says what is wrong
        pairs = zip(parts, self._arrays, strict=True)
        return [part.view(array.dtype.numpy_dtype).reshape(-1, *array.shape[1:]) for part, array in pairs]

    def _read_tensorstore(self, rows: Int[np.ndarray, "rows"]) -> "_Futures":
        index = rows if rows.size else slice(0, 0)  # an empty list of indices would ask for chunk 0
        return _Futures([array[index].read() for array in self._arrays])

    def _require_regular(self, shards: Set[int]) -> None:
        """Check the files of shards before they are first opened."""
        for shard in shards - self._checked_shards:
            for path, metadata in self._metadata.items():
                claimed = len(self._shards.rows(shard)) * _row_bytes(metadata)
                self._kvstore.require_bytes(shard_file(path, metadata, shard), claimed, self._compressed)
            self._checked_shards.add(shard)

    def _has_expected_codecs(self) -> bool:
        stored = {path: self._kvstore.read_node(path) or {} for path in self._metadata}
        return all(stored[path].get("codecs") == metadata["codecs"] for path, metadata in self._metadata.items())

    def _local_chunks(self, path: str, metadata: dict[str, Any]) -> LocalChunks:
        folder = local_path(self._kvstore.url)
        return LocalChunks(
            _open_files(),
            paths=[f"{folder}/{shard_file(path, metadata, shard)}" for shard in self._shards],
            shards=self._shards,
            row_bytes=_row_bytes(metadata),
            cache_rows=len(metadata["shape"]) == 2,  # scales
        )


class _Futures:
    """Several futures as one."""

    def __init__(self, futures: Sequence[Any]) -> None:
        self._futures = futures

    def result(self) -> Sequence[np.ndarray]:
        return [future.result() for future in self._futures]


@dataclass(frozen=True, kw_only=True)
class PendingRead:
    """Reads of several layers in progress; `result` waits for them."""

    futures: Mapping[int, Any]  # by layer
    split: str
    place: str
    check: Callable[[Sequence[Encoded]], None]  # raises JobError for values that must not be returned

    def result(self) -> dict[int, Encoded]:
        """Layer -> stored values (rows, tokens, dim) and, for int8, scales (rows, tokens)."""
        by_layer = {layer: Encoded(*self._wait(layer)) for layer in self.futures}
        self.check(list(by_layer.values()))
        return by_layer

    def _wait(self, layer: int) -> list[Any]:
        try:
            parts: list[Any] = wait([self.futures[layer]], f"read layer {layer} of {self.place}{self.split}")[0]
            return parts
        except OutageError:
            raise
        except JobError as error:
            shards = _SHARD_OF_FILE.findall(str(error))
            prefix = f"shard {shards[-1]} of {self.split}: " if shards else ""
            raise JobError(f"{prefix}{error}") from error


def _row_bytes(metadata: dict[str, Any]) -> int:
    n_bytes: int = math.prod(metadata["shape"][1:]) * np.dtype(metadata["data_type"]).itemsize
    return n_bytes


@cache
def _threads() -> ThreadPoolExecutor:
    """One pool for all stores."""
    return ThreadPoolExecutor(_MAX_THREADS, "sidecache-read")


@cache
def _open_files() -> OpenFiles:
    """The open files of all stores, since the limit on them is the process's."""
    return OpenFiles(min(_MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
