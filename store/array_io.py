"""Opens, reads and writes single Zarr arrays of a store.

Arrays in shards are opened through tensorstore, which stores chunks of zeros too and fails to read missing chunks, so
that a missing file never reads as zeros.

Small arrays in one chunk (labels, ids, RMS, tail) are read and written whole, without tensorstore. Their zarr.json
holds a digest of the array's name and file, which detects a file that was moved to another array although its own
checksum is right.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numcodecs
import numpy as np
import tensorstore as ts

from store.errors import JobError
from store.io_errors import NEEDS_REPLACING
from store.kvstore import KeyValueStore, node_key
from store.zarr_metadata import CRC32C, array_metadata, chunk_codecs

CONTENT = "content"  # the attribute with the digest of a one-chunk array
_SHAPE_FIELDS = ("shape", "data_type", "chunk_grid")
_CRC32C_BYTES = 4
_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)} - {"float8"}


def open_array(
    kvstore: KeyValueStore,
    name: str,
    expected: Mapping[str, Any] | None = None,
    missing_reads_as_zero: bool = False,
    may_be_longer: bool = False,
) -> ts.TensorStore:
    """Open an array through tensorstore, for reading and writing.

    Args:
        expected: the metadata that the array should have; another shape, type or grid is refused before any memory is
            allocated.
        missing_reads_as_zero: read missing chunks as zeros, instead of failing.
        may_be_longer: accept more samples than expected, since the store may have grown.

    Raises:
        JobError: its zarr.json is missing, damaged, or not as expected.
    """
    kvstore.require_same_disk()
    metadata = _read_metadata(kvstore, name)
    wrong = [field for field in _SHAPE_FIELDS if expected and metadata.get(field) != expected[field]]
    if expected and wrong == ["shape"] and may_be_longer and _is_longer(metadata["shape"], expected["shape"]):
        wrong = []
    if expected and wrong:
        raise JobError(
            f"{kvstore.place}{node_key(name)} is not that of this array: its {wrong[0]} is "
            f"{metadata.get(wrong[0])!r}, should be {expected[wrong[0]]!r}; {NEEDS_REPLACING}"
        )
    return kvstore.open_tensorstore(name, metadata, missing_reads_as_zero)


def create_array(kvstore: KeyValueStore, name: str, metadata: dict[str, Any]) -> ts.TensorStore:
    """Create an array and open it through tensorstore; existing metadata is replaced."""
    kvstore.write_node(name, metadata)
    return open_array(kvstore, name, metadata)


def write_array(kvstore: KeyValueStore, name: str, values: np.ndarray, dimension_names: Sequence[str]) -> None:
    """Write a small array in one chunk."""
    metadata = array_metadata(
        shape=values.shape,
        file_shape=values.shape,
        dtype=str(values.dtype),
        dimension_names=dimension_names,
        codecs=chunk_codecs(None),
    )
    _write_chunk(kvstore, name, metadata, values.astype(values.dtype.newbyteorder("<")).tobytes())


def read_array(kvstore: KeyValueStore, name: str) -> np.ndarray:
    """Read a small array whole.

    Raises:
        JobError: it is missing or damaged.
    """
    metadata, content = _read_chunk(kvstore, name)
    dtype, shape = metadata.get("data_type"), metadata["shape"]
    if dtype not in _DTYPES or math.prod(shape) * np.dtype(dtype).itemsize != len(content):
        raise _damaged(kvstore, name, f"{len(content):,} bytes are not {dtype!r} values of shape {shape}")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def write_strings(kvstore: KeyValueStore, name: str, values: Sequence[str], dimension: str) -> None:
    """Write strings as Zarr's `string` type, which tensorstore lacks, in one chunk with a checksum."""
    metadata = array_metadata(
        shape=[len(values)],
        file_shape=[len(values)],
        dtype="string",
        dimension_names=[dimension],
        codecs=[{"name": "vlen-utf8"}, CRC32C],
    )
    _write_chunk(kvstore, name, metadata, bytes(numcodecs.VLenUTF8().encode(np.array(values, dtype=object))))


def read_strings(kvstore: KeyValueStore, name: str) -> list[str]:
    """Read what `write_strings` wrote.

    Raises:
        JobError: it is missing or damaged.
    """
    metadata, content = _read_chunk(kvstore, name)
    n_strings = int.from_bytes(content[:4], "little")  # the decoder allocates memory for so many
    if metadata["shape"] != [n_strings] or 4 + 4 * n_strings > max(4, len(content)):
        raise _damaged(kvstore, name, f"{len(content):,} bytes are not strings of shape {metadata['shape']}")
    try:
        return [str(text) for text in numcodecs.VLenUTF8().decode(content)] if n_strings else []
    except ValueError as error:
        raise _damaged(kvstore, name, str(error)) from error


def _damaged(kvstore: KeyValueStore, name: str, reason: str) -> JobError:
    return JobError(f"{kvstore.place}{name} is damaged: {reason}; {NEEDS_REPLACING}")


def _write_chunk(kvstore: KeyValueStore, name: str, metadata: dict[str, Any], content: bytes) -> None:
    """Write an array in one chunk: the chunk with its checksum, then the metadata with the digest of both."""
    stored = b""
    if 0 not in metadata["shape"]:
        stored = bytes(numcodecs.CRC32C(location="end").encode(content))
        kvstore.write_bytes(f"{name}/{_chunk_key(metadata)}", stored)
    kvstore.write_node(name, {**metadata, "attributes": {CONTENT: _content_digest(name, metadata, stored)}})


def _read_chunk(kvstore: KeyValueStore, name: str) -> tuple[dict[str, Any], bytes]:
    """Metadata and content of an array in one chunk, compared with the digest of both."""
    metadata = _read_metadata(kvstore, name)
    key = f"{name}/{_chunk_key(metadata)}"
    stored = b"" if 0 in metadata["shape"] else kvstore.read_bytes(key)
    if stored is None:
        raise JobError(f"{kvstore.place}{key} is missing; {NEEDS_REPLACING}")
    if metadata["attributes"].get(CONTENT) != _content_digest(name, metadata, stored):
        raise JobError(
            f"{kvstore.place}{key} is damaged, or another array's: its content is not what {node_key(name)} says; "
            + NEEDS_REPLACING
        )
    return metadata, stored[:-_CRC32C_BYTES]


def _read_metadata(kvstore: KeyValueStore, name: str) -> dict[str, Any]:
    """The zarr.json of an array that must exist."""
    metadata = kvstore.read_node(name)
    shape = None if metadata is None else metadata.get("shape")
    if metadata is None or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        problem = "missing" if metadata is None else "not that of an array"
        raise JobError(f"{kvstore.place}{node_key(name)} is {problem}; {NEEDS_REPLACING}")
    return metadata


def _is_longer(shape: Sequence[Any], expected: Sequence[int]) -> bool:
    same_rank_and_rows = len(shape) == len(expected) and shape[1:] == expected[1:]
    return same_rank_and_rows and type(shape[0]) is int and shape[0] > expected[0]


def _chunk_key(metadata: Mapping[str, Any]) -> str:
    return "/".join(["c", *("0" for _ in metadata["shape"])])


def _content_digest(name: str, metadata: Mapping[str, Any], stored: bytes) -> str:
    """A digest of an array's name, shape, type and file."""
    digest = hashlib.blake2b(json.dumps([name, metadata["shape"], metadata.get("data_type")]).encode(), digest_size=8)
    digest.update(stored)
    return digest.hexdigest()
