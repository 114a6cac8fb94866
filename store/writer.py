"""Creates a store and commits shards to it.

Order is the protocol. Creation writes everything that is known before the first forward pass and the root group last:
a folder without root attributes is no store yet. A shard writes its layers, waits until they are durable, and then its
rows of `status`: a shard counts from that moment on, and a crash at any instant leaves it either whole or missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from store.backend import Folder, wait
from store.errors import JobError
from store.formats import INT8_ENCODING, STORED_DTYPE, Encoded
from store.metadata import array_metadata, chunk_codecs, sharded
from store.schema import Schema, require_version

MISSING, STORED, SKIPPED = 0, 1, 2
LOG = "_log"


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
    n, shard = schema.splits[split].num_samples, schema.shard_samples
    layout, dtype = schema.token_layout, schema.dtype
    row = (layout.num_tokens, schema.dim)
    attributes = {"encoding": {"bfloat16": "bfloat16", "int8": INT8_ENCODING}.get(dtype, dtype)}
    codecs = sharded((1, *row), schema.compressor, np.dtype(STORED_DTYPE[dtype]).itemsize)
    for layer in schema.layers:
        metadata = array_metadata(
            (n, *row), (shard, *row), STORED_DTYPE[dtype], ["sample", "token", "dim"], codecs, attributes
        )
        folder.create_array(f"{split}/{layer_name(layer)}", metadata)
        if dtype == "int8":
            scale = array_metadata(
                (n, row[0]), (shard, row[0]), "float32", ["sample", "token"], sharded((1, row[0]), None)
            )
            folder.create_array(f"{split}/{scale_name(layer)}", scale)
    folder.write_array(f"{split}/label", listing.labels, ["sample", "class"][: listing.labels.ndim])
    folder.write_array(f"{split}/sample_digest", listing.digests, ["sample", "byte"])
    folder.write_strings(f"{split}/sample_id", listing.ids, "sample")
    status = array_metadata((n,), (shard,), "uint8", ["sample"], chunk_codecs(None))
    folder.create_array(f"{split}/status", status)


def read_status(folder: Folder, split: str) -> UInt8[np.ndarray, "samples"]:
    """MISSING, STORED or SKIPPED for every row of a split; a mark that was never written reads as MISSING."""
    status = folder.open_array(f"{split}/status", missing_reads_as_zero=True)
    if not status.shape[0]:
        return np.zeros(0, np.uint8)
    return np.asarray(wait([status.read()], f"read {folder.place}{split}/status")[0])


def holds_samples(folder: Folder, schema: Schema) -> bool:
    """Whether any shard of a store is committed."""
    return any((read_status(folder, split) != MISSING).any() for split in schema.splits)


class StoreWriter:
    """Commits shards to a store that exists."""

    def __init__(self, folder: Folder, schema: Schema) -> None:
        self._folder, self._schema = folder, schema

    def missing_shards(self, split: str) -> list[int]:
        """Shards that carry no commit mark."""
        status, shards = read_status(self._folder, split), self._schema.shards(split)
        return [shard for shard in shards if status[shards.rows(shard).start] == MISSING]

    def commit(self, split: str, shard: int, tokens: Mapping[int, Encoded], status: UInt8[np.ndarray, "rows"]) -> None:
        """Make one shard durable, then mark it.

        Args:
            tokens: layer -> encoded rows of the shard (rows, tokens, dim), zeros in skipped rows; every layer.
            status: STORED or SKIPPED for every row of the shard.

        Raises:
            JobError: the disk refused; the shard stays missing and the store as it was.
            ValueError: layers, shapes or dtypes are not those of the shard.
        """
        rows = self._schema.shards(split).rows(shard)
        self._check_shard(tokens, status, len(rows))
        writes = []
        for layer, encoded in tokens.items():
            arrays = {layer_name(layer): encoded.values}
            if encoded.scale is not None:
                arrays[scale_name(layer)] = encoded.scale
            for name, values in arrays.items():
                target = self._folder.open_array(f"{split}/{name}")[rows.start : rows.stop]
                writes.append(target.write(values, can_reference_source_data_indefinitely=True))
        wait(writes, f"write shard {shard} of {split} to {self._folder.place}")
        mark = self._folder.open_array(f"{split}/status")[rows.start : rows.stop]
        wait([mark.write(status)], f"commit shard {shard} of {split} to {self._folder.place}")

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
