"""The arrays of one layer, read from files that are local and hold plain rows, else through tensorstore."""

import math
import os
import resource
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int

from store.address import local_path
from store.arrays import holds_plain_rows, layer_arrays, shard_arrays, shard_file
from store.kvstore import KeyValueStore
from store.local.chunks import LocalChunks, Picked, UnreadableError
from store.local.open_files import OpenFiles
from store.schema import Schema

# Reads under way at once: out of memory, more of them only wait for each other in Python; a disk would like a few more.
_THREADS = min(8, 2 * (os.cpu_count() or 1))
_OPEN_FILES = 4096


class Layer:
    """One layer of a split: its values and, for int8, their scales.

    Attributes:
        has_grown: whether the store has more samples than the schema says.

    Raises:
        JobError: what describes its arrays is damaged, or does not fit.
    """

    def __init__(self, folder: KeyValueStore, schema: Schema, split: str, layer: int) -> None:
        expected = {name: shard_arrays(schema, split)[name] for name in layer_arrays(schema, layer)}
        self._folder, self._regular = folder, set[int]()
        self._shards, self._compressed = schema.shards(split), schema.compressor is not None
        self._files = {f"{split}/{name}": given for name, given in expected.items()}
        self._arrays = [folder.open_array(name, given, may_be_longer=True) for name, given in self._files.items()]
        self.has_grown = any(array.shape[0] > schema.splits[split].num_samples for array in self._arrays)
        self._chunks: list[LocalChunks] = []
        if _is_plain(folder, schema, split, expected):
            self._chunks = [_local_chunks(folder, schema, split, name, given) for name, given in expected.items()]

    def fetch(self, rows: Int[np.ndarray, "rows"], picked: Picked) -> Any:
        """A future of the stored values of some rows, an array for each of the layer's."""
        if self._chunks and rows.size:
            return _threads().submit(self._read, rows, picked)
        self._require_regular(picked.runs.keys())
        return self._through_tensorstore(rows)

    def _read(self, rows: Int[np.ndarray, "rows"], picked: Picked) -> Sequence[np.ndarray]:
        try:
            self._require_regular(picked.runs.keys())
            found = [chunks.read(picked) for chunks in self._chunks]
        except (OSError, UnreadableError):
            self._regular -= picked.runs.keys()  # some file is another by now, perhaps
            self._require_regular(picked.runs.keys())
            return self._through_tensorstore(rows).result()  # which reads it all the same, or says what is wrong
        pairs = zip(found, self._arrays, strict=True)
        return [raw.view(array.dtype.numpy_dtype).reshape(-1, *array.shape[1:]) for raw, array in pairs]

    def _require_regular(self, shards: Set[int]) -> None:
        """Look at the files of shards before they are first opened."""
        for shard in shards - self._regular:
            for name, metadata in self._files.items():
                claimed = len(self._shards.rows(shard)) * _row_bytes(metadata)
                self._folder.require_bytes(shard_file(name, metadata, shard), claimed, self._compressed)
            self._regular.add(shard)

    def _through_tensorstore(self, rows: Int[np.ndarray, "rows"]) -> "_Gathered":
        chosen = rows if rows.size else slice(0, 0)  # an empty list of indices would ask for chunk 0
        return _Gathered([array[chosen].read() for array in self._arrays])


class _Gathered:
    """Several futures as one."""

    def __init__(self, futures: Sequence[Any]) -> None:
        self._futures = futures

    def result(self) -> Sequence[np.ndarray]:
        return [future.result() for future in self._futures]


def _is_plain(folder: KeyValueStore, schema: Schema, split: str, expected: dict[str, dict[str, Any]]) -> bool:
    if not holds_plain_rows(folder, schema):
        return False
    found = {name: folder.read_node(f"{split}/{name}") or {} for name in expected}
    return all(found[name].get("codecs") == given["codecs"] for name, given in expected.items())


def _local_chunks(
    folder: KeyValueStore, schema: Schema, split: str, name: str, metadata: dict[str, Any]
) -> LocalChunks:
    short = len(metadata["shape"]) == 2  # the scales of tokens
    shards = schema.shards(split)
    paths = [f"{local_path(folder.url)}/{split}/{shard_file(name, metadata, shard)}" for shard in shards]
    return LocalChunks(_open_files(), paths, shards, _row_bytes(metadata), short)


def _row_bytes(metadata: dict[str, Any]) -> int:
    n_bytes: int = math.prod(metadata["shape"][1:]) * np.dtype(metadata["data_type"]).itemsize
    return n_bytes


@cache
def _threads() -> ThreadPoolExecutor:
    """One for all stores."""
    return ThreadPoolExecutor(_THREADS, "sidecache-read")


@cache
def _open_files() -> OpenFiles:
    """One for all stores, since it is the process whose open files are limited."""
    return OpenFiles(min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
