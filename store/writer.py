"""Creates a store and commits shards to it.

Order is the protocol. Creation writes everything that is known before the first forward pass and the root group last:
a folder without root attributes is no store yet. A shard writes its layers, waits until they are durable, and then its
rows of `status`: a shard counts from that moment on, and a crash at any instant leaves it either whole or missing.

The checksum of a chunk says that it is whole, not whose it is. So `shard_digest` keeps a CRC-32 of every layer of a
shard, over the rows' status, values and scales: `verify` compares it and finds files that were exchanged. Reading rows
does not: it would need the whole shard.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Shaped, UInt8

from store.backend import Folder, store_url, wait
from store.errors import JobError
from store.formats import INT8_ENCODING, STORED_DTYPE, Encoded
from store.lock import Lock, hold
from store.metadata import array_metadata, chunk_codecs, sharded
from store.schema import Schema, require_version

MISSING, STORED, SKIPPED = 0, 1, 2
LOG, STATUS, DIGEST = "_log", "status", "shard_digest"


@dataclass(frozen=True)
class Listing:
    """What is known of a split's samples before any of them is decoded."""

    ids: tuple[str, ...]
    labels: Shaped[np.ndarray, "samples ..."]
    digests: UInt8[np.ndarray, "samples 16"]


def layer_name(layer: int) -> str:
    """`layer_03`: two digits, so that names sort as layers do."""
    return f"layer_{layer:02d}"


def scale_name(layer: int) -> str:
    """`scale_03`: the int8 scale of every token of a layer."""
    return f"scale_{layer:02d}"


def create_store(
    folder: Folder,
    schema: Schema,
    listings: Mapping[str, Listing],
    rms: Mapping[int, Float32[np.ndarray, "dim"]],
    tail: Mapping[str, Float32[np.ndarray, "..."]],
) -> None:
    """Write a store without samples. Safe to repeat after a crash; the root group is written last.

    Args:
        listings: ids, labels and digests of every split of the schema.
        rms: layer -> per-channel RMS (dim,), int8 stores only.
        tail: the arrays that `schema.tail_tensors` names.

    Raises:
        JobError: the disk refused, or shards of another store lie there already.
    """
    _refuse_old_marks(folder, schema)
    for split, listing in listings.items():
        _create_split(folder, schema, split, listing)
        folder.write_group(split, {})
    for group, arrays in (("rms", {layer_name(k): v for k, v in rms.items()}), ("tail", dict(tail))):
        for name, values in arrays.items():
            dimensions = ["channel"] if values.ndim == 1 else [f"dim_{axis}" for axis in range(values.ndim)]
            folder.write_array(f"{group}/{name}", values, dimensions)
        folder.write_group(group, {})
    folder.write_group(LOG, {"extract_seconds": 0.0, "skipped": {}})
    folder.write_group("", schema.model_dump(mode="json"))


def _refuse_old_marks(folder: Folder, schema: Schema) -> None:
    """Marks without a root group are left from a store that somebody took apart; here they would vouch for its data."""
    for split in schema.splits:
        if folder.has_keys(f"{split}/status/c"):
            raise JobError(
                f"{folder.place}{split} holds shards of a store that is gone; delete that folder, or choose another "
                "store.path"
            )


def _create_split(folder: Folder, schema: Schema, split: str, listing: Listing) -> None:
    for name, metadata in shard_arrays(schema, split).items():
        folder.create_array(f"{split}/{name}", metadata)
    folder.write_array(f"{split}/label", listing.labels, ["sample", "class"][: listing.labels.ndim])
    folder.write_array(f"{split}/sample_digest", listing.digests, ["sample", "byte"])
    folder.write_strings(f"{split}/sample_id", listing.ids, "sample")


def shard_arrays(schema: Schema, split: str) -> dict[str, dict[str, Any]]:
    """Name -> metadata of a split's arrays that are written shard by shard, one file a shard."""
    n, shard = schema.splits[split].num_samples, schema.shard_samples
    dtype, row = schema.dtype, (schema.token_layout.num_tokens, schema.dim)
    attributes = {"encoding": {"bfloat16": "bfloat16", "int8": INT8_ENCODING}.get(dtype, dtype)}
    codecs = sharded((1, *row), schema.compressor, np.dtype(STORED_DTYPE[dtype]).itemsize)
    axes = ["sample", "token", "dim"]
    values = array_metadata((n, *row), (shard, *row), STORED_DTYPE[dtype], axes, codecs, attributes)
    scale = array_metadata((n, row[0]), (shard, row[0]), "float32", axes[:2], sharded((1, row[0]), None))
    arrays = {layer_name(layer): values for layer in schema.layers}
    if dtype == "int8":
        arrays |= {scale_name(layer): scale for layer in schema.layers}
    arrays[STATUS] = array_metadata((n,), (shard,), "uint8", ["sample"], chunk_codecs(None))
    shape = (len(schema.shards(split)), len(schema.layers))
    arrays[DIGEST] = array_metadata(shape, (1, shape[1]), "uint32", ["shard", "layer"], chunk_codecs(None))
    return arrays


def layer_arrays(schema: Schema, layer: int) -> list[str]:
    """The arrays that hold a layer: its values and, for int8, their scales."""
    return [layer_name(layer)] + ([scale_name(layer)] if schema.dtype == "int8" else [])


def shard_file(name: str, metadata: Mapping[str, Any], shard: int) -> str:
    """The key of one shard of an array that `shard_arrays` names, below its split."""
    return "/".join([name, "c", str(shard), *("0" for _ in metadata["shape"][1:])])


def layer_digest(encoded: Encoded, status: UInt8[np.ndarray, "rows"]) -> int:
    """CRC-32 of one layer of a shard, and of which of its rows are stored."""
    crc = 0
    for part in (status, encoded.values, encoded.scale):
        if part is not None:
            crc = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, crc)  # lets other threads run meanwhile
    return crc


def read_status(folder: Folder, schema: Schema, split: str) -> UInt8[np.ndarray, "samples"]:
    """MISSING, STORED or SKIPPED for every row of a split; a mark that was never written reads as MISSING."""
    expected = shard_arrays(schema, split)[STATUS]
    status = folder.open_array(f"{split}/{STATUS}", expected, missing_reads_as_zero=True)
    if not status.shape[0]:
        return np.zeros(0, np.uint8)
    return np.asarray(wait([status.read()], f"read {folder.place}{split}/{STATUS}")[0])


def holds_samples(folder: Folder, schema: Schema) -> bool:
    """Whether any shard of a store is committed."""
    return any((read_status(folder, schema, split) != MISSING).any() for split in schema.splits)


class StoreWriter:
    """Commits shards to a store that exists; under a lock, only while that is still held."""

    def __init__(self, folder: Folder, schema: Schema, lock: Lock | None = None) -> None:
        self._folder, self._schema, self._lock = folder, schema, lock

    def missing_shards(self, split: str) -> list[int]:
        """Shards that carry no commit mark."""
        status, shards = read_status(self._folder, self._schema, split), self._schema.shards(split)
        return [shard for shard in shards if status[shards.rows(shard).start] == MISSING]

    def commit(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Make one shard durable, then mark it.

        Args:
            tokens: layer -> encoded rows of the shard (rows, tokens, dim), zeros in skipped rows; every layer.
            status: STORED or SKIPPED for every row of the shard.

        Raises:
            JobError: the disk refused, or another job took the store over; the shard stays missing and the store as it
                was.
            ValueError: layers, shapes or dtypes are not those of the shard.
        """
        rows = self._schema.shards(split).rows(shard)
        self._check_shard(tokens, status, len(rows))
        self._check_lock()
        writes = []
        for layer in self._schema.layers:
            parts = [part for part in (tokens[layer].values, tokens[layer].scale) if part is not None]
            for name, values in zip(layer_arrays(self._schema, layer), parts, strict=True):
                target = self._open(split, name)[rows.start : rows.stop]
                writes.append(target.write(values, can_reference_source_data_indefinitely=True))
        digests = np.array([layer_digest(tokens[layer], status) for layer in self._schema.layers], np.uint32)
        writes.append(self._open(split, DIGEST)[shard].write(digests))
        wait(writes, f"write shard {shard} of {split} to {self._folder.place}")
        self._check_lock()
        self._mark(split, shard, status)

    def unmark(self, split: str, shards: Iterable[int]) -> None:
        """Make shards missing, so that the extraction replaces them: first the marks, then the files go.

        The files must go: a damaged one would stop the write that is to replace it, where that has to read it first.

        Raises:
            JobError: the disk refused, or another job took the store over; some of the shards may be missing already.
        """
        for shard in shards:
            self._check_lock()
            self._mark(split, shard, np.full(len(self._schema.shards(split).rows(shard)), MISSING, np.uint8))
            for name in set(shard_arrays(self._schema, split)) - {STATUS}:
                self._folder.remove(f"{split}/{name}/c/{shard}")

    def _mark(self, split: str, shard: int, status: UInt8[np.ndarray, "rows"]) -> None:
        rows = self._schema.shards(split).rows(shard)
        mark = self._open(split, STATUS)[rows.start : rows.stop]
        wait([mark.write(status)], f"commit shard {shard} of {split} to {self._folder.place}")

    def _open(self, split: str, name: str) -> ts.TensorStore:
        return self._folder.open_array(f"{split}/{name}", shard_arrays(self._schema, split)[name])

    def _check_lock(self) -> None:
        if self._lock:
            self._lock.check()

    def _check_shard(self, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"], n_rows: int) -> None:
        """tensorstore would broadcast a wrong shape and convert a wrong dtype in silence."""
        schema = self._schema
        shape = (n_rows, schema.token_layout.num_tokens, schema.dim)
        if set(tokens) != set(schema.layers) or len(status) != n_rows or (status == MISSING).any():
            raise ValueError(f"this shard takes layers {schema.layers} and {n_rows} statuses")
        for layer, encoded in tokens.items():
            scaled = encoded.scale is not None and encoded.scale.shape == shape[:2]
            fits = encoded.values.shape == shape and encoded.values.dtype == STORED_DTYPE[schema.dtype]
            if not fits or scaled != (schema.dtype == "int8"):
                got = f"{encoded.values.dtype} {encoded.values.shape}"
                raise ValueError(f"layer {layer} of this shard takes {schema.dtype} values {shape}, got {got}")

    def add_to_log(self, seconds: Mapping[str, float], skipped: Mapping[str, str]) -> None:
        """Add up time spent by name, and samples skipped (id -> reason); outside every comparison of bytes."""
        self._check_lock()
        log = self.read_log()
        log |= {name: log.get(name, 0.0) + spent for name, spent in seconds.items()}
        log["skipped"] = {**log.get("skipped", {}), **skipped}
        self._folder.write_group(LOG, log)

    def read_log(self) -> dict[str, Any]:
        """The attributes of the `_log` group."""
        return self._folder.read_group(LOG) or {}


def open_schema(folder: Folder) -> Schema | None:
    """The schema of the store in a folder, or None where there is no store yet.

    Raises:
        UserError: what lies there is no store, or one of another format.
        JobError: the store's own description is damaged.
    """
    document = folder.read_json("zarr.json")
    if document is None:
        return None
    require_version(document.get("attributes"), folder.place)  # before the checksum: another format may have none
    attributes = folder.read_group("")
    return None if attributes is None else Schema.parse(attributes, folder.place)


def require_store(folder: Folder) -> Schema:
    """The schema of a store that must exist.

    Raises:
        JobError: there is no store.
    """
    schema = open_schema(folder)
    if schema is None:
        raise JobError(f"there is no store at {folder.place}; make one with `sidecache extract`")
    return schema


def read_rms(folder: Folder, schema: Schema) -> dict[int, Float32[np.ndarray, "dim"]]:
    """The per-channel RMS of every layer, int8 stores only; else empty."""
    if schema.dtype != "int8":
        return {}
    return {layer: folder.read_array(f"rms/{layer_name(layer)}") for layer in schema.layers}


def unmark_shards(path: str | Path, shards: Mapping[str, Iterable[int]]) -> None:
    """Make shards of a store missing, for the next extraction to replace; see `StoreWriter.unmark`."""
    folder = Folder(store_url(path))
    with hold(folder) as lock:
        writer = StoreWriter(folder, require_store(folder), lock)
        for split, numbers in shards.items():
            writer.unmark(split, numbers)
