"""Builds Zarr v3 metadata: codecs, the documents of arrays, and the checksum in every zarr.json."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from store.config import Compressor

CHECKSUM = "checksum"  # the attribute that holds a zarr.json's own checksum
CRC32C = {"name": "crc32c"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_COMPRESSORS: dict[Compressor, dict[str, Any]] = {
    "zstd": {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
    "gzip": {"name": "gzip", "configuration": {"level": 5}},
    "blosc": {
        "name": "blosc",
        "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "blocksize": 0},
    },
}


def chunk_codecs(compressor: Compressor | None, item_bytes: int = 1) -> list[dict[str, Any]]:
    """The codecs of a chunk: bytes, a compressor if any, then crc32c; `item_bytes` is the size of one value."""
    if compressor is None:
        return [_LITTLE, CRC32C]
    codec = _COMPRESSORS[compressor]
    size = {"typesize": item_bytes} if compressor == "blosc" else {}
    return [_LITTLE, {**codec, "configuration": {**codec["configuration"], **size}}, CRC32C]


def sharded(chunk: Sequence[int], compressor: Compressor | None, item_bytes: int = 1) -> list[dict[str, Any]]:
    """The sharding codec: chunks inside one file, with an index that has a crc32c too."""
    inner = {
        "chunk_shape": list(chunk),
        "codecs": chunk_codecs(compressor, item_bytes),
        "index_codecs": [_LITTLE, CRC32C],
    }
    return [{"name": "sharding_indexed", "configuration": inner}]


def array_metadata(
    shape: Sequence[int],
    file_shape: Sequence[int],
    dtype: str,
    dimension_names: Sequence[str],
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A Zarr v3 array's metadata; `file_shape` is the shape of one file (a shard, or an unsharded chunk)."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in file_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "" if dtype == "string" else 0,
        "codecs": codecs,
        "dimension_names": list(dimension_names),
        "attributes": attributes or {},
    }


def document_checksum(document: dict[str, Any]) -> str:
    """The checksum of a zarr.json, computed without that checksum and without what zarr.consolidate_metadata adds."""
    attributes = {name: value for name, value in document["attributes"].items() if name != CHECKSUM}
    rest = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    text = json.dumps({**rest, "attributes": attributes}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
