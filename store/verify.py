"""Verifies a store: reads every byte of it and reports all damage.

Chunks and shard indices have a crc32c, every zarr.json has a checksum, `shard_digest` identifies the values of each
shard and layer, and a digest binds each one-chunk array to its name. A changed byte is unreported only if a document
still parses to the same content: white space between its fields, or the case of a letter in an escape such as \\u00e9.
Memory: one shard of one layer.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import UInt8, UInt32

from store.address import store_url
from store.array_io import open_array, read_array, read_strings
from store.arrays import (
    DIGEST,
    LABEL,
    LOG,
    MISSING,
    SAMPLE_DIGEST,
    SAMPLE_ID,
    SKIPPED,
    STATUS,
    STORED,
    VALIDATION,
    is_log,
    layer_arrays,
    layer_digest,
    layer_name,
    open_schema,
    refuse_half_grown,
    shard_arrays,
    shard_file,
)
from store.console.progress import progress
from store.dtypes import CODES, Encoded
from store.errors import JobError, UserError
from store.growing.added_layers import names_of_added
from store.io_errors import AccessError, OutageError
from store.kvstore import LOCK, KeyValueStore, wait
from store.listing import label_fault, validation_fault
from store.lock import read_owner
from store.schema import Schema
from store.verify_report import Damage, Report

_FILE_OF_WHOLE_ARRAY = re.compile(r"(.+)/(zarr\.json|c(/0)*)")


def verify_store(path: str | Path) -> Report:
    """Read all of a store and report everything that is wrong with it.

    Raises:
        JobError: there is no store, or it cannot be reached; or its growth was interrupted.
        UserError: the path is empty.
    """
    kvstore = KeyValueStore(store_url(path))
    keys = kvstore.keys()
    if not keys:
        raise JobError(f"there is no store at {kvstore.place}; make one with `sidecache extract`")
    irregular = {fault.path.removeprefix(kvstore.place): str(fault) for fault in kvstore.irregular()}
    report = Report(kvstore.place, faults=[*irregular.values()])
    if irregular:
        _attempt(report, lambda: refuse_half_grown(kvstore))
    else:
        refuse_half_grown(kvstore)
    for key in keys:
        if key.rpartition("/")[2] == "zarr.json" and key != f"{LOCK}/zarr.json":
            _attempt(report, partial(kvstore.read_node, key.removesuffix("zarr.json").rstrip("/")))
            report.bytes_read += len(_attempt(report, partial(kvstore.read_bytes, key)) or b"")
    schema = _attempt(report, lambda: open_schema(kvstore))
    if schema:
        _Verification(kvstore, schema, report, keys=set(keys), irregular=irregular.keys()).run()
    elif not report.faults:
        report.faults.append(f"{kvstore.place}zarr.json is missing: without it this is not a store; extract it again")
    return report


def _attempt(report: Report, call: Callable[[], Any]) -> Any:
    """The result of a call; if it fails None, and a fault, which is listed once."""
    try:
        return call()
    except OutageError:
        raise
    except (JobError, UserError) as error:
        if str(error) not in report.faults:
            report.faults.append(str(error))
        return None


@dataclass(frozen=True)
class _Shard:
    """One shard of a split; `arrays` are None where they cannot be opened."""

    split: str
    number: int
    arrays: dict[str, ts.TensorStore | None]


class _Verification:
    """Verifies a store whose schema can be read."""

    def __init__(
        self,
        kvstore: KeyValueStore,
        schema: Schema,
        report: Report,
        keys: Collection[str],
        irregular: Collection[str],
    ) -> None:
        self._kvstore, self._schema, self._report = kvstore, schema, report
        self._keys, self._files_of_store = keys, {"zarr.json", *irregular}
        self._whole_arrays: set[str] = set()

    def run(self) -> None:
        schema, n_layers = self._schema, len(self._schema.layers)
        self._report.complete = True
        # groups and small arrays of the whole store
        for name in (*schema.splits, "rms", "tail", LOG):
            self._check_group(name)
        for layer in schema.layers if schema.dtype in CODES else ():
            rms = self._read_whole(f"rms/{layer_name(layer)}", "float32", (schema.dim,))
            if rms is not None and not (rms > 0).all():
                self._add_fault(f"rms/{layer_name(layer)}", "has values that are not positive")
        for name in schema.tail_tensors:
            self._read_whole(f"tail/{name}", "float32")
        # listings and shards
        total = n_layers * sum(len(schema.shards(split)) for split in schema.splits)
        with progress("verifying", total, "shards") as advance:
            for split in schema.splits:
                self._check_listing(split)
                for _ in self._check_shards(split):
                    advance(n_layers)
        self._note_other_files()

    def _check_group(self, name: str) -> None:
        self._files_of_store.add(f"{name}/zarr.json")
        attributes = _attempt(self._report, lambda: self._kvstore.read_group(name))
        if f"{name}/zarr.json" not in self._keys:
            self._add_fault(f"{name}/zarr.json", "is missing")
        elif attributes is not None and not (is_log(attributes) if name == LOG else attributes == {}):
            self._add_fault(f"{name}/zarr.json", "is another group's")

    def _check_listing(self, split: str) -> None:
        """Check labels, ids, digests and validation marks of samples."""
        n = self._schema.splits[split].num_samples
        labels = self._read_whole(f"{split}/{LABEL}")
        if labels is not None and (fault := label_fault(labels, self._schema, n)):
            self._add_fault(f"{split}/{LABEL}", fault)
        self._read_whole(f"{split}/{SAMPLE_DIGEST}", "uint8", (n, 16))
        if self._schema.marks_validation(split):
            marks = self._read_whole(f"{split}/{VALIDATION}")
            if marks is not None and (fault := validation_fault(marks, n)):
                self._add_fault(f"{split}/{VALIDATION}", fault)
        self._whole_arrays.add(f"{split}/{SAMPLE_ID}")
        ids = _attempt(self._report, lambda: read_strings(self._kvstore, f"{split}/{SAMPLE_ID}"))
        if ids is not None and len(ids) != n:
            self._add_fault(f"{split}/{SAMPLE_ID}", f"has {len(ids)} ids for {n} samples")
        self._report.bytes_read += sum(len(text.encode()) for text in ids or ())
        if repeated := [repr(text) for text, times in Counter(ids or ()).items() if times > 1]:
            self._add_fault(f"{split}/{SAMPLE_ID}", f"has {len(repeated)} ids more than once, such as {repeated[0]}")

    def _read_whole(self, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Any:
        """An array in one chunk; None if it is damaged, or of another type or shape."""
        self._whole_arrays.add(name)
        values: np.ndarray | None = _attempt(self._report, lambda: read_array(self._kvstore, name))
        if values is None:
            return None
        self._report.bytes_read += values.nbytes
        if dtype not in (None, values.dtype) or shape not in (None, values.shape):
            self._add_fault(name, f"holds {values.dtype} {values.shape}; should be {dtype} {shape or ''}")
            return None
        return values

    def _check_shards(self, split: str) -> Iterable[int]:
        """Check one shard after the other; yields each number when it is checked."""
        arrays = {}
        for name, metadata in shard_arrays(self._schema, split).items():
            options = {"missing_reads_as_zero": name == STATUS}  # a missing mark means MISSING
            call = partial(open_array, self._kvstore, f"{split}/{name}", metadata, **options)
            arrays[name] = _attempt(self._report, call)
            self._files_of_store.add(f"{split}/{name}/zarr.json")
        self._report.complete &= arrays[STATUS] is not None
        for shard in self._schema.shards(split):
            files = {name: self._file(split, name, shard) for name in arrays}
            self._files_of_store.update(files.values())
            if arrays[STATUS] is not None:
                self._check_shard(_Shard(split, shard, arrays), {files[name] for name in arrays if name != STATUS})
            yield shard

    def _check_shard(self, shard: _Shard, files: Collection[str]) -> None:
        status = self._read(shard, STATUS)
        if status is None:
            return
        if (status == MISSING).all():
            self._report.complete = False
            if uncommitted := set(files) & set(self._keys):
                self._report.notes.append(
                    f"{len(uncommitted)} files are in shard {shard.number} of {shard.split}, which is not committed"
                )
        elif not np.isin(status, (STORED, SKIPPED)).all():
            self._add_damage(shard, STATUS, None, f"its marks are {sorted(set(status.tolist()))}; legal: 1 and 2")
        else:
            self._check_layers(shard, status)

    def _check_layers(self, shard: _Shard, status: UInt8[np.ndarray, "rows"]) -> None:
        """Read all layers of a shard, and compare them with their digests."""
        digests: UInt32[np.ndarray, "1 layers"] | None = self._read(shard, DIGEST)
        for position, layer in enumerate(self._schema.layers):
            parts = [self._read(shard, name, layer) for name in layer_arrays(self._schema, layer)]
            if digests is None or any(part is None for part in parts):
                continue
            if layer_digest(Encoded(*parts), status) != digests[0, position]:  # type: ignore[arg-type]
                reason = "its values or marks are whole, but not those that were committed: files were exchanged"
                self._add_damage(shard, layer_name(layer), layer, reason)

    def _read(self, shard: _Shard, name: str, layer: int | None = None) -> np.ndarray | None:
        """One shard of an array; None if the array cannot be opened, or the shard is damaged."""
        array = shard.arrays[name]
        if array is None:
            return None
        rows = self._schema.shards(shard.split).rows(shard.number)
        part = slice(shard.number, shard.number + 1) if name == DIGEST else slice(rows.start, rows.stop)
        claimed = (part.stop - part.start) * math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize
        file, is_compressed = self._file(shard.split, name, shard.number), self._schema.compressor is not None
        try:
            self._kvstore.require_bytes(file, claimed, is_compressed)
            values = np.asarray(wait([array[part].read()], "read it")[0])
        except AccessError as error:
            self._add_damage(shard, name, layer, error.reason)
            return None
        self._report.bytes_read += values.nbytes
        return values

    def _note_other_files(self) -> None:
        """Note files that are not part of the store: layers that are being added, a lock, leftovers."""
        others = set(self._keys) - self._files_of_store
        added_names = _attempt(self._report, lambda: names_of_added(self._kvstore)) or ()
        added = {key for key in others if key.startswith(tuple(f"{name}/" for name in added_names))}
        notes = self._report.notes
        if added:
            notes.append(f"{len(added)} files are of layers that are being added; they are not part of the store yet")
        for key in sorted(others - added):
            whole = _FILE_OF_WHOLE_ARRAY.fullmatch(key)
            if key == f"{LOCK}/zarr.json":
                owner = _attempt(self._report, lambda: read_owner(self._kvstore))
                notes.append(f"{owner or 'a job'} holds the store; files that it is writing may look damaged")
            elif key.endswith(".__lock"):
                notes.append(f"{key} is a temporary file of a write that was killed or is in progress; harmless")
            elif not whole or whole[1] not in self._whole_arrays:
                notes.append(f"{key} is not part of the store")

    def _file(self, split: str, name: str, shard: int) -> str:
        return f"{split}/{shard_file(name, shard_arrays(self._schema, split)[name], shard)}"

    def _add_damage(self, shard: _Shard, name: str, layer: int | None, reason: str) -> None:
        rows = self._schema.shards(shard.split).rows(shard.number)
        self._report.damaged.append(
            Damage(
                split=shard.split,
                layer=layer,
                shard=shard.number,
                rows=(rows.start, rows.stop),
                file=self._file(shard.split, name, shard.number),
                reason=reason,
            )
        )

    def _add_fault(self, name: str, text: str) -> None:
        self._report.faults.append(f"{self._kvstore.place}{name} {text}")
