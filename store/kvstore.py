"""Arrays and groups through tensorstore, in a local folder or in an object store.

tensorstore syncs file and folder before a write returns, and so does `durable`, which writes the shards of local,
uncompressed stores. tensorstore is told to store chunks of zeros and to refuse to read chunks that are missing, so that
nothing ever reads as zeros that was not written as such. Chunks carry crc32c; every zarr.json carries a checksum of
itself among its attributes, which this module checks before it believes a word of it.
The zarr.json of an array in one chunk carries a digest of its name and content besides, so that a file in another
array's place is found out, though its own checksum fits.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import tensorstore as ts

from store.address import array_members, kvstore_spec, local_path, new_context
from store.errors import JobError, UserError
from store.io_errors import NEEDS_REPLACING, AccessError, failure
from store.local.durable_files import TEMPORARY, remove_leftovers, write_files
from store.local.regular_files import IrregularError, irregular, require_regular, total_bytes
from store.zarr_metadata import CHECKSUM, CRC32C, array_metadata, chunk_codecs, document_checksum

CONTENT = "content"  # the attribute that binds a one-chunk array's metadata to its file
LOCK = "_log/lock"  # outlives `clear`
_SHAPE_FIELDS = ("shape", "data_type", "chunk_grid")
_CRC32C_BYTES = 4
_HARMLESS_BYTES = 64 * 2**20
_MOST_COMPRESSED = 2**15  # zeros, by zstd
_WHOLE_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)} - {"float8"}


class KeyValueStore:
    """The key-value side of a store: small documents, and arrays by name below `url`.

    `place` is what messages call it: the path of a local folder, else the URL. Every method raises JobError where the
    disk refuses or something is damaged, with the path and what to do.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        folder = local_path(url)
        self.place = url if folder is None else f"{folder}/"
        self._root = None if folder is None else str(folder)
        self._spec = kvstore_spec(url)
        self._documents = _checked(
            lambda: ts.KvStore.open(self._spec, context=_context()).result(), f"open {self.place}"
        )
        self._disk: int | None = None

    def stay_on_disk(self) -> None:
        """From now on, refuse to write where this folder is gone, or on another disk than it is now.

        A disk that is unmounted leaves an empty folder behind, in which a store would be begun anew, unseen.
        """
        if folder := local_path(self.url):
            self._disk = _device(folder)

    def require_regular(self, key: str) -> int | None:
        """Refuse what lies at a key, or on the way to it, where that is a link, a FIFO or the like (regular.py).

        Returns the bytes there, None where there is nothing, or no local folder.
        """
        root = self._root
        return None if root is None else _checked(lambda: require_regular(root, key), f"read {self.place}{key}")

    def require_bytes(self, key: str, claimed: int, compressed: bool = False) -> None:
        """Refuse a local file of far fewer bytes than what it is to hold, before memory is taken for that."""
        held = self.require_regular(key) or 0
        if self._root is not None and claimed > _HARMLESS_BYTES + held * (_MOST_COMPRESSED if compressed else 1):
            reason = f"its {held:,} bytes cannot hold the {claimed:,} that the metadata claim"
            raise AccessError(f"{self.place}{key} is damaged: {reason}; {NEEDS_REPLACING}", reason)

    def require_all_regular(self, name: str = "") -> None:
        """The same for all that lies below a name; every folder is listed."""
        if name:
            self.require_regular(name)
        for fault in self.irregular(name):
            raise fault

    def irregular(self, name: str = "") -> Iterator[IrregularError]:
        """A refusal for each of these, below a name."""
        if self._root is not None:
            found = irregular(f"{self._root}/{name}".rstrip("/"))
            while fault := _checked(lambda: next(found, None), f"list {self.place}{name}"):
                yield fault

    def n_bytes(self) -> int | None:
        """Of all files together; None where they are not in a local folder."""
        root = self._root
        return None if root is None else _checked(lambda: total_bytes(root), f"list {self.place}")

    def write_json(self, key: str, document: dict[str, Any]) -> None:
        """Write a document whole; it is durable when this returns."""
        self.write_bytes(key, json.dumps(document, indent=1).encode())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """A document, or None where there is none."""
        content = self.read_bytes(key)
        if content is None:
            return None
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise JobError(f"{self.place}{key} is damaged: {error}; {NEEDS_REPLACING}") from error
        return document if isinstance(document, dict) else {}

    def write_node(self, name: str, document: dict[str, Any]) -> None:
        """The zarr.json of a group or array, with its checksum; the root is the empty name."""
        attributes = {**document["attributes"], CHECKSUM: document_checksum(document)}
        self.write_json(_node_key(name), {**document, "attributes": attributes})

    def read_node(self, name: str) -> dict[str, Any] | None:
        """The zarr.json of a group or array, checked; None where there is no such node."""
        document = self.read_json(_node_key(name))
        if document is None:
            return None
        attributes = document.get("attributes")
        if not isinstance(attributes, dict) or attributes.get(CHECKSUM) != document_checksum(document):
            raise JobError(
                f"{self.place}{_node_key(name)} was damaged, or edited by hand: its checksum does not fit; "
                + NEEDS_REPLACING
            )
        return document

    def write_bytes(self, key: str, content: bytes) -> None:
        """Write one key whole."""
        self._require_place(key)
        _checked(lambda: self._documents.write(key, content).result(), f"write {self.place}{key}")

    def write_files(self, files: Iterable[tuple[str, Sequence[memoryview]]], doing: str) -> None:
        """Write many keys of a local folder whole, for whoever holds the store; all are durable when this returns."""
        self._require_disk()
        folder = local_path(self.url)
        assert folder is not None

        def places() -> Iterator[tuple[Path, Sequence[memoryview]]]:
            for key, pieces in files:
                self.require_regular(key)
                remove_leftovers(folder / key)
                yield folder / key, pieces

        _checked(lambda: write_files(places()), doing)

    def read_bytes(self, key: str) -> bytes | None:
        """One key whole, or None where it is missing."""
        return self.read_stamped(key)[0]

    def read_stamped(self, key: str) -> tuple[bytes | None, bytes]:
        """One key, or None where it is missing, and its generation: what `write_if` compares."""
        self.require_regular(key)
        found = _checked(lambda: self._documents.read(key).result(), f"read {self.place}{key}")
        return bytes(found.value) if found.state == "value" else None, found.stamp.generation

    def write_if(self, key: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Write or delete one key if it still is of that generation; the new generation, or None where it is not."""
        self._require_place(key)
        stamp = _checked(
            lambda: self._documents.write(key, content, if_equal=generation).result(), f"write {self.place}{key}"
        )
        if not stamp.generation:
            self.has_keys(LOCK)  # raises where there is no bucket, to which S3 gives the same answer
        return stamp.generation or None

    def write_group(self, name: str, attributes: dict[str, Any]) -> None:
        """A Zarr v3 group's metadata; the root is the empty name."""
        self.write_node(name, {"zarr_format": 3, "node_type": "group", "attributes": attributes})

    def read_group(self, name: str) -> dict[str, Any] | None:
        """A group's attributes, or None where there is no such group."""
        document = self.read_node(name)
        if document is None:
            return None
        return {key: value for key, value in document["attributes"].items() if key != CHECKSUM}

    def has_keys(self, name: str) -> bool:
        """Whether anything lies below `name`."""
        self.require_regular(name)
        below = ts.KvStore.KeyRange(f"{name}/", f"{name}0")  # 0 is the character that follows the slash
        return bool(_checked(lambda: self._documents.list(below).result(), f"list {self.place}{name}"))

    def keys(self) -> list[str]:
        """Every key; in a local folder every file, what tensorstore leaves behind when it is killed included."""
        folder = local_path(self.url)
        if folder is not None:
            found = (f"{place}/{name}" for place, _, names in os.walk(folder) for name in names)
            return sorted(os.fsencode(file[len(str(folder)) + 1 :]).decode(errors="replace") for file in found)
        listed = _checked(lambda: self._documents.list().result(), f"list {self.place}")
        return sorted(key.decode(errors="replace") for key in listed)

    def remove(self, name: str) -> None:
        """Delete all that lies below `name`."""
        self.require_all_regular(name)
        self._remove(ts.KvStore.KeyRange(f"{name}/", f"{name}0"))

    def clear(self) -> None:
        """Delete everything but the lock, the root group first: from then on there is no store."""
        self.require_all_regular()
        self._remove(ts.KvStore.KeyRange("zarr.json", "zarr.json0"))
        self._remove(ts.KvStore.KeyRange("", f"{LOCK}/"))
        self._remove(ts.KvStore.KeyRange(f"{LOCK}0", ""))

    def _require_place(self, key: str) -> None:
        """That a key can be written, whose temporary file tensorstore would write through to where it leads."""
        self._require_disk()
        self.require_regular(key)
        self.require_regular(f"{key}{TEMPORARY}")

    def _require_disk(self) -> None:
        if self._disk is not None and self._disk != _device(local_path(self.url)):
            raise JobError(
                f"{self.place} is gone, or lies on another disk than it did: was that unmounted? Mount it again, then "
                "run the same command again; what is committed is kept"
            )

    def _remove(self, keys: ts.KvStore.KeyRange) -> None:
        self._require_disk()
        _checked(lambda: self._documents.delete_range(keys).result(), f"delete from {self.place}")

    def open_array(
        self,
        name: str,
        expected: Mapping[str, Any] | None = None,
        missing_reads_as_zero: bool = False,
        may_be_longer: bool = False,
    ) -> ts.TensorStore:
        """An array for reading and writing; reading what was never written fails, unless told otherwise.

        `expected` is the metadata that the array should have: those of another shape, type or grid are refused before
        anything is allocated. With `may_be_longer` there may be more samples than expected, since the store may have
        grown.
        """
        self._require_disk()
        document = self._require_array(name)
        wrong = [field for field in _SHAPE_FIELDS if expected and document.get(field) != expected[field]]
        if expected and wrong == ["shape"] and may_be_longer and _is_longer(document["shape"], expected["shape"]):
            wrong = []
        if expected and wrong:
            raise JobError(
                f"{self.place}{_node_key(name)} is not that of this array: its {wrong[0]} is "
                f"{document.get(wrong[0])!r}, should be {expected[wrong[0]]!r}; {NEEDS_REPLACING}"
            )
        spec = {
            "driver": "zarr3",
            "kvstore": {**self._spec, "path": f"{self._spec['path']}{name}/"},
            "metadata": document,
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": missing_reads_as_zero,
            **array_members(self.url),
        }
        # What was just read and checked is taken at its word: tensorstore does not read it a second time.
        array: ts.TensorStore = _checked(
            lambda: ts.open(spec, open=True, assume_metadata=True, context=_context()).result(),
            f"open {self.place}{name}",
        )
        return array

    def create_array(self, name: str, metadata: dict[str, Any]) -> ts.TensorStore:
        """A new array; metadata that lie there already are replaced."""
        self.write_node(name, metadata)
        return self.open_array(name, metadata)

    def write_array(self, name: str, values: np.ndarray, dimension_names: Sequence[str]) -> None:
        """A small array in one chunk."""
        metadata = array_metadata(values.shape, values.shape, str(values.dtype), dimension_names, chunk_codecs(None))
        self._write_whole(name, metadata, values.astype(values.dtype.newbyteorder("<")).tobytes())

    def read_array(self, name: str) -> np.ndarray:
        """A small array whole."""
        document, content = self._read_whole(name)
        dtype, shape = document.get("data_type"), document["shape"]
        if dtype not in _WHOLE_DTYPES or math.prod(shape) * np.dtype(dtype).itemsize != len(content):
            raise self._misfit(name, f"{len(content):,} bytes are no {dtype!r} values of shape {shape}")
        return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)

    def write_strings(self, name: str, values: Sequence[str], dimension: str) -> None:
        """Strings as Zarr's `string` type (tensorstore has none), in one chunk with a checksum."""
        codecs = [{"name": "vlen-utf8"}, CRC32C]
        metadata = array_metadata([len(values)], [len(values)], "string", [dimension], codecs)
        self._write_whole(name, metadata, bytes(numcodecs.VLenUTF8().encode(np.array(values, dtype=object))))

    def read_strings(self, name: str) -> list[str]:
        """The inverse of `write_strings`."""
        document, content = self._read_whole(name)
        claimed = int.from_bytes(content[:4], "little")  # what the decoder takes memory for
        if document["shape"] != [claimed] or 4 + 4 * claimed > max(4, len(content)):
            raise self._misfit(name, f"{len(content):,} bytes are no strings of shape {document['shape']}")
        try:
            return [str(text) for text in numcodecs.VLenUTF8().decode(content)] if claimed else []
        except ValueError as error:
            raise self._misfit(name, str(error)) from error

    def _misfit(self, name: str, reason: str) -> JobError:
        return JobError(f"{self.place}{name} is damaged: {reason}; {NEEDS_REPLACING}")

    def _write_whole(self, name: str, metadata: dict[str, Any], content: bytes) -> None:
        stored = b""
        if 0 not in metadata["shape"]:
            stored = bytes(numcodecs.CRC32C(location="end").encode(content))
            self.write_bytes(f"{name}/{_only_chunk(metadata)}", stored)
        self.write_node(name, {**metadata, "attributes": {CONTENT: _content_digest(name, metadata, stored)}})

    def _read_whole(self, name: str) -> tuple[dict[str, Any], bytes]:
        """Metadata and content of an array in one chunk, which the digest, read first, vouches for together."""
        document = self._require_array(name)
        key = f"{name}/{_only_chunk(document)}"
        stored = b"" if 0 in document["shape"] else self.read_bytes(key)
        if stored is None:
            raise JobError(f"{self.place}{key} is missing; {NEEDS_REPLACING}")
        if document["attributes"].get(CONTENT) != _content_digest(name, document, stored):
            raise JobError(
                f"{self.place}{key} is damaged, or another array's: its content is not what {_node_key(name)} says; "
                + NEEDS_REPLACING
            )
        return document, stored[:-_CRC32C_BYTES]

    def _require_array(self, name: str) -> dict[str, Any]:
        document = self.read_node(name)
        shape = None if document is None else document.get("shape")
        if document is None or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            what = "missing" if document is None else "that of no array"
            raise JobError(f"{self.place}{_node_key(name)} is {what}; {NEEDS_REPLACING}")
        return document


def wait(futures: Sequence[Any], doing: str) -> list[Any]:
    """Results of tensorstore futures; their failure as one clear line."""
    results: list[Any] = _checked(lambda: [future.result() for future in futures], doing)
    return results


def check_process() -> None:
    """Refuse to go on in a process forked from one that used a store: tensorstore would abort it.

    Raises:
        UserError: says how to start workers instead.
    """
    if _owner() != os.getpid():
        raise UserError(
            "a store cannot be used in a process forked from one that used it; start workers afresh: "
            "DataLoader(..., multiprocessing_context='forkserver'), or 'spawn'"
        )


@cache
def _owner() -> int:
    return os.getpid()


@cache
def _context() -> ts.Context:
    """One for all: memory:// lives in it, and limits on concurrent reads hold for all arrays together."""
    return new_context()


def _device(folder: Path | None) -> int | None:
    try:
        return folder.stat().st_dev if folder else None
    except OSError:
        return None


def _node_key(name: str) -> str:
    return f"{name}/zarr.json" if name else "zarr.json"


def _is_longer(shape: Sequence[Any], expected: Sequence[int]) -> bool:
    alike = len(shape) == len(expected) and shape[1:] == expected[1:]
    return alike and type(shape[0]) is int and shape[0] > expected[0]


def _only_chunk(metadata: Mapping[str, Any]) -> str:
    return "/".join(["c", *("0" for _ in metadata["shape"])])


def _content_digest(name: str, metadata: Mapping[str, Any], stored: bytes) -> str:
    """Of an array's name, shape, type and file."""
    digest = hashlib.blake2b(json.dumps([name, metadata["shape"], metadata.get("data_type")]).encode(), digest_size=8)
    digest.update(stored)
    return digest.hexdigest()


def _checked(call: Any, doing: str) -> Any:
    check_process()
    try:
        return call()
    except (ValueError, OSError, OverflowError, NotImplementedError) as error:  # what tensorstore reports a failure as
        raise failure(error, doing) from error
