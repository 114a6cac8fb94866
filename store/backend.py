"""Arrays and groups through tensorstore, on a local folder or any URL it knows (s3://, gs://, memory://).

tensorstore syncs file and folder before a write returns. It is told to store chunks of zeros and to refuse to read
chunks that are missing, so that nothing ever reads as zeros that was not written as such.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numcodecs
import numpy as np
import tensorstore as ts

from store.config import Compressor
from store.errors import JobError

_CRC32C = {"name": "crc32c"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_COMPRESSORS: dict[Compressor, dict[str, Any]] = {
    "zstd": {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
    "gzip": {"name": "gzip", "configuration": {"level": 5}},
    "blosc": {
        "name": "blosc",
        "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "typesize": 1, "blocksize": 0},
    },
}


def store_url(path: str | Path) -> str:
    """A folder or URL as a URL that ends in a slash."""
    text = str(path)
    url = text if "://" in text else Path(text).expanduser().absolute().as_uri()
    return url.rstrip("/") + "/"


def local_path(url: str) -> Path | None:
    """The folder behind a file:// URL, else None."""
    return Path(unquote(url.removeprefix("file://"))) if url.startswith("file://") else None


def chunk_codecs(compressor: Compressor | None) -> list[dict[str, Any]]:
    """bytes, perhaps a compressor, then a checksum of what lies on the disk."""
    return [_LITTLE, *([_COMPRESSORS[compressor]] if compressor else []), _CRC32C]


def sharded(chunk: Sequence[int], compressor: Compressor | None) -> list[dict[str, Any]]:
    """The sharding codec: chunks inside one file, with an index that is checked too."""
    inner = {"chunk_shape": list(chunk), "codecs": chunk_codecs(compressor), "index_codecs": [_LITTLE, _CRC32C]}
    return [{"name": "sharding_indexed", "configuration": inner}]


def array_metadata(
    shape: Sequence[int],
    file_shape: Sequence[int],
    dtype: str,
    dimension_names: Sequence[str],
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A Zarr v3 array's metadata; `file_shape` is the extent of one file (a shard, or an unsharded chunk)."""
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


class Folder:
    """The key-value side of a store: small documents, and arrays by name below `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._documents = _checked(lambda: ts.KvStore.open(url).result(), f"open {url}")

    def write_json(self, key: str, document: dict[str, Any]) -> None:
        """Write a document whole; it is durable when this returns."""
        self.write_bytes(key, json.dumps(document, indent=1, sort_keys=True).encode())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """A document, or None where there is none."""
        content = self.read_bytes(key)
        if content is None:
            return None
        try:
            document = json.loads(content)
        except ValueError as error:
            raise JobError(f"{self.url}{key} is damaged: {error}") from error
        return document if isinstance(document, dict) else {}

    def write_bytes(self, key: str, content: bytes) -> None:
        """Write one key whole."""
        _checked(lambda: self._documents.write(key, content).result(), f"write {self.url}{key}")

    def read_bytes(self, key: str) -> bytes | None:
        """One key whole, or None where it is missing."""
        found = _checked(lambda: self._documents.read(key).result(), f"read {self.url}{key}")
        return bytes(found.value) if found.state == "value" else None

    def write_group(self, name: str, attributes: dict[str, Any]) -> None:
        """A Zarr v3 group's metadata; the root is the empty name."""
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        self.write_json(f"{name}/zarr.json" if name else "zarr.json", document)

    def read_group(self, name: str) -> dict[str, Any] | None:
        """A group's attributes, or None where there is no such group."""
        document = self.read_json(f"{name}/zarr.json" if name else "zarr.json")
        return None if document is None else dict(document.get("attributes", {}))

    def open_array(self, name: str, missing_reads_as_zero: bool = False) -> ts.TensorStore:
        """An array for reading and writing; reading what was never written fails, unless told otherwise."""
        spec = {
            "driver": "zarr3",
            "kvstore": f"{self.url}{name}/",
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": missing_reads_as_zero,
        }
        array: ts.TensorStore = _checked(lambda: ts.open(spec, open=True).result(), f"open {self.url}{name}")
        return array

    def create_array(self, name: str, metadata: dict[str, Any]) -> ts.TensorStore:
        """A new array; metadata that lie there already are replaced."""
        self.write_json(f"{name}/zarr.json", metadata)
        return self.open_array(name)

    def write_array(self, name: str, values: np.ndarray, dimension_names: Sequence[str]) -> None:
        """A small array in one chunk."""
        metadata = array_metadata(values.shape, values.shape, str(values.dtype), dimension_names, chunk_codecs(None))
        array = self.create_array(name, metadata)
        if values.size:
            wait([array.write(values)], f"write {self.url}{name}")

    def read_array(self, name: str) -> np.ndarray:
        """A small array whole."""
        array = self.open_array(name)
        if 0 in array.shape:
            return np.zeros(array.shape, array.dtype.numpy_dtype)
        return np.asarray(wait([array.read()], f"read {self.url}{name}")[0])

    def write_strings(self, name: str, values: Sequence[str], dimension: str) -> None:
        """Strings as Zarr's `string` type (tensorstore has none), in one chunk with a checksum."""
        codecs = [{"name": "vlen-utf8"}, _CRC32C]
        encoded = numcodecs.VLenUTF8().encode(np.array(values, dtype=object))
        self.write_bytes(f"{name}/c/0", bytes(numcodecs.CRC32C(location="end").encode(encoded)))
        self.write_json(
            f"{name}/zarr.json", array_metadata([len(values)], [len(values)], "string", [dimension], codecs)
        )

    def read_strings(self, name: str) -> list[str]:
        """The inverse of `write_strings`."""
        content = self.read_bytes(f"{name}/c/0")
        if content is None:
            raise JobError(f"{self.url}{name} is missing; run `sidecache extract` again into a new store.path")
        try:
            checked = numcodecs.CRC32C(location="end").decode(content)
            return [str(text) for text in numcodecs.VLenUTF8().decode(checked)]
        except (RuntimeError, ValueError) as error:
            raise JobError(f"{self.url}{name} is damaged: {error}") from error


def wait(futures: Sequence[Any], doing: str) -> list[Any]:
    """Results of tensorstore futures; their failure as one clear line."""
    results: list[Any] = _checked(lambda: [future.result() for future in futures], doing)
    return results


def _checked(call: Any, doing: str) -> Any:
    try:
        return call()
    except (ValueError, OSError) as error:  # tensorstore reports I/O failures as ValueError, some also as OSError
        reason = str(error).split(" [", maxsplit=1)[0].split("[tensorstore_spec", maxsplit=1)[0].strip()
        raise JobError(f"cannot {doing}: {reason}") from error
