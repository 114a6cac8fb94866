"""Reads and writes the keys of a store, in a local folder or in an object store, through tensorstore.

A key holds bytes, a JSON document, or the zarr.json of a group or array. Every zarr.json has a checksum of itself among
its attributes, which is compared before the document is used. tensorstore syncs file and folder before a write returns;
so does `write_files`, which writes the shards of local, uncompressed stores.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tensorstore as ts

from store.address import array_options, kvstore_spec, local_path, new_context
from store.errors import JobError, UserError
from store.io_errors import NEEDS_REPLACING, AccessError, failure
from store.local.durable_files import TEMPORARY, remove_leftovers, write_files
from store.local.regular_files import IrregularError, irregular, require_regular, total_bytes
from store.zarr_metadata import CHECKSUM, document_checksum

LOCK = "_log/lock"  # `clear` keeps it
_HARMLESS_BYTES = 64 * 2**20
_MAX_COMPRESSION = 2**15  # of zeros, by zstd


class KeyValueStore:
    """The keys of a store below a URL.

    Every method raises JobError where the disk refuses or something is damaged, with the path and what to do.

    Attributes:
        url: ends in a slash.
        place: the store's name in messages; the path of a local folder, else the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        folder = local_path(url)
        self.place = url if folder is None else f"{folder}/"
        self._root = None if folder is None else str(folder)
        self._spec = kvstore_spec(url)
        self._driver = _run(lambda: ts.KvStore.open(self._spec, context=_context()).result(), f"open {self.place}")
        self._disk: int | None = None

    def stay_on_disk(self) -> None:
        """From now on, refuse to write where the folder is gone, or on another disk than it is now.

        An unmounted disk leaves an empty folder behind, in which a new store would be started unnoticed.
        """
        if folder := local_path(self.url):
            self._disk = _device(folder)

    def require_same_disk(self) -> None:
        """Refuse to go on where the disk of `stay_on_disk` is gone."""
        if self._disk is not None and self._disk != _device(local_path(self.url)):
            raise JobError(
                f"{self.place} is gone, or on another disk than before: was that unmounted? Mount it again, then "
                "run the same command again; what is committed is kept"
            )

    def require_regular(self, key: str) -> int | None:
        """Refuse a key that is, or is below, a link, a FIFO or the like (see `store.local.regular_files`).

        Returns:
            its bytes; None where it is missing, or where this is no local folder.
        """
        root = self._root
        return None if root is None else _run(lambda: require_regular(root, key), f"read {self.place}{key}")

    def require_bytes(self, key: str, claimed: int, compressed: bool = False) -> None:
        """Refuse a local file that is far too small for its claimed content, before memory is allocated for that."""
        n_bytes = self.require_regular(key) or 0
        if self._root is not None and claimed > _HARMLESS_BYTES + n_bytes * (_MAX_COMPRESSION if compressed else 1):
            reason = f"its {n_bytes:,} bytes cannot hold the {claimed:,} that the metadata claim"
            raise AccessError(f"{self.place}{key} is damaged: {reason}; {NEEDS_REPLACING}", reason)

    def require_all_regular(self, name: str = "") -> None:
        """Check everything below a name as `require_regular` does; every folder is listed."""
        if name:
            self.require_regular(name)
        for fault in self.irregular(name):
            raise fault

    def irregular(self, name: str = "") -> Iterator[IrregularError]:
        """An error for each link, FIFO or the like below a name."""
        if self._root is not None:
            faults = irregular(f"{self._root}/{name}".rstrip("/"))
            while fault := _run(lambda: next(faults, None), f"list {self.place}{name}"):
                yield fault

    def _require_writable(self, key: str) -> None:
        """Check a key and its temporary file: tensorstore would write through a link there."""
        self.require_same_disk()
        self.require_regular(key)
        self.require_regular(f"{key}{TEMPORARY}")

    def read_bytes(self, key: str) -> bytes | None:
        """One key whole, or None where it is missing."""
        return self.read_with_generation(key)[0]

    def read_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        """One key, or None where it is missing, and its generation, which `write_if` compares."""
        self.require_regular(key)
        found = _run(lambda: self._driver.read(key).result(), f"read {self.place}{key}")
        return bytes(found.value) if found.state == "value" else None, found.stamp.generation

    def write_bytes(self, key: str, content: bytes) -> None:
        """Write one key whole; it is durable when this returns."""
        self._require_writable(key)
        _run(lambda: self._driver.write(key, content).result(), f"write {self.place}{key}")

    def write_if(self, key: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Write one key, or delete it (None), if it still has that generation.

        Returns:
            the new generation; None where the key had another one.
        """
        self._require_writable(key)
        stamp = _run(lambda: self._driver.write(key, content, if_equal=generation).result(), f"write {self.place}{key}")
        if not stamp.generation:
            self.has_keys(LOCK)  # raises where there is no bucket, to which S3 gives the same answer
        return stamp.generation or None

    def write_files(self, files: Iterable[tuple[str, Sequence[memoryview]]], doing: str) -> None:
        """Write many files of a local folder whole, each from its pieces; all are durable when this returns.

        The caller holds the store's lock: temporary files that a killed writer left are removed.
        """
        self.require_same_disk()
        folder = local_path(self.url)
        assert folder is not None

        def paths() -> Iterator[tuple[Path, Sequence[memoryview]]]:
            for key, pieces in files:
                self.require_regular(key)
                remove_leftovers(folder / key)
                yield folder / key, pieces

        _run(lambda: write_files(paths()), doing)

    def write_json(self, key: str, document: dict[str, Any]) -> None:
        """Write a document whole; it is durable when this returns."""
        self.write_bytes(key, json.dumps(document, indent=1).encode())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """A document, or None where it is missing."""
        content = self.read_bytes(key)
        if content is None:
            return None
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise JobError(f"{self.place}{key} is damaged: {error}; {NEEDS_REPLACING}") from error
        return document if isinstance(document, dict) else {}

    def write_node(self, name: str, document: dict[str, Any]) -> None:
        """Write the zarr.json of a group or array, with its checksum; the root is the empty name."""
        attributes = {**document["attributes"], CHECKSUM: document_checksum(document)}
        self.write_json(node_key(name), {**document, "attributes": attributes})

    def read_node(self, name: str) -> dict[str, Any] | None:
        """The zarr.json of a group or array, its checksum compared; None where it is missing."""
        document = self.read_json(node_key(name))
        if document is None:
            return None
        attributes = document.get("attributes")
        if not isinstance(attributes, dict) or attributes.get(CHECKSUM) != document_checksum(document):
            raise JobError(
                f"{self.place}{node_key(name)} was damaged, or edited by hand: its checksum does not fit; "
                + NEEDS_REPLACING
            )
        return document

    def write_group(self, name: str, attributes: dict[str, Any]) -> None:
        """Write a Zarr v3 group's metadata; the root is the empty name."""
        self.write_node(name, {"zarr_format": 3, "node_type": "group", "attributes": attributes})

    def read_group(self, name: str) -> dict[str, Any] | None:
        """A group's attributes, or None where it is missing."""
        document = self.read_node(name)
        if document is None:
            return None
        return {key: value for key, value in document["attributes"].items() if key != CHECKSUM}

    def has_keys(self, name: str) -> bool:
        """Whether there are keys below `name`."""
        self.require_regular(name)
        return bool(_run(lambda: self._driver.list(_below(name)).result(), f"list {self.place}{name}"))

    def keys(self) -> list[str]:
        """Every key; in a local folder every file, those that a killed tensorstore left behind included."""
        folder = local_path(self.url)
        if folder is not None:
            files = (f"{place}/{name}" for place, _, names in os.walk(folder) for name in names)
            return sorted(os.fsencode(file[len(str(folder)) + 1 :]).decode(errors="replace") for file in files)
        listed = _run(lambda: self._driver.list().result(), f"list {self.place}")
        return sorted(key.decode(errors="replace") for key in listed)

    def n_bytes(self) -> int | None:
        """Bytes of all files together; None where this is no local folder."""
        root = self._root
        return None if root is None else _run(lambda: total_bytes(root), f"list {self.place}")

    def remove(self, name: str) -> None:
        """Delete everything below `name`."""
        self.require_all_regular(name)
        self._remove(_below(name))

    def clear(self) -> None:
        """Delete everything but the lock; the root group goes first, so that from then on there is no store."""
        self.require_all_regular()
        self._remove(ts.KvStore.KeyRange("zarr.json", "zarr.json0"))
        self._remove(ts.KvStore.KeyRange("", f"{LOCK}/"))
        self._remove(ts.KvStore.KeyRange(f"{LOCK}0", ""))

    def _remove(self, keys: ts.KvStore.KeyRange) -> None:
        self.require_same_disk()
        _run(lambda: self._driver.delete_range(keys).result(), f"delete from {self.place}")

    def open_tensorstore(self, name: str, metadata: dict[str, Any], missing_reads_as_zero: bool) -> ts.TensorStore:
        """Open an array whose metadata the caller has verified, so tensorstore does not read them a second time."""
        spec = {
            "driver": "zarr3",
            "kvstore": {**self._spec, "path": f"{self._spec['path']}{name}/"},
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": missing_reads_as_zero,
            **array_options(self.url),
        }
        array: ts.TensorStore = _run(
            lambda: ts.open(spec, open=True, assume_metadata=True, context=_context()).result(),
            f"open {self.place}{name}",
        )
        return array


def node_key(name: str) -> str:
    """The key of a group's or array's zarr.json; the root is the empty name."""
    return f"{name}/zarr.json" if name else "zarr.json"


def wait(futures: Sequence[Any], doing: str) -> list[Any]:
    """Results of tensorstore futures; a failure is one clear line that begins with "cannot" and `doing`."""
    results: list[Any] = _run(lambda: [future.result() for future in futures], doing)
    return results


def check_process() -> None:
    """Refuse to go on in a process that was forked from one that used a store: tensorstore would abort it.

    Raises:
        UserError: says how to start workers instead.
    """
    if _process_of_first_use() != os.getpid():
        raise UserError(
            "a store cannot be used in a process forked from one that used it; start new worker processes: "
            "DataLoader(..., multiprocessing_context='forkserver'), or 'spawn'"
        )


@cache
def _process_of_first_use() -> int:
    return os.getpid()


@cache
def _context() -> ts.Context:
    """One context for all stores: memory:// is kept in it, and its limits hold for all arrays together."""
    return new_context()


def _device(folder: Path | None) -> int | None:
    try:
        return folder.stat().st_dev if folder else None
    except OSError:
        return None


def _below(name: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(f"{name}/", f"{name}0")  # 0 is the character that follows the slash


def _run(call: Callable[[], Any], doing: str) -> Any:
    """The result of a call; its failure as one clear line."""
    check_process()
    try:
        return call()
    except (ValueError, OSError, OverflowError, NotImplementedError) as error:  # those that tensorstore raises
        raise failure(error, doing) from error
