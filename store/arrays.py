"""What a store is made of: its arrays by name, and what can be read of it before any token is."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, UInt8

from store.address import local_path
from store.dtypes import INT8_ENCODING, STORED_DTYPE, Encoded
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING, OutageError
from store.kvstore import KeyValueStore, wait
from store.schema import Schema, require_version
from store.zarr_metadata import array_metadata, chunk_codecs, sharded

MISSING, STORED, SKIPPED = 0, 1, 2
LOG, STATUS, DIGEST = "_log", "status", "shard_digest"
NEXT, ADDED = f"{LOG}/next", f"{LOG}/added"  # a growth that is decided; layers under way (growth.py, added_layers.py)
MARKS = frozenset((STATUS, DIGEST))

Marks = dict[str, UInt8[np.ndarray, "samples"]]  # by split
Listed = TypeVar("Listed", np.ndarray, list[str])


def layer_name(layer: int) -> str:
    """`layer_03`: two digits, so that names sort as layers do."""
    return f"layer_{layer:02d}"


def scale_name(layer: int) -> str:
    """`scale_03`: the int8 scale of every token of a layer."""
    return f"scale_{layer:02d}"


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


def is_log(attributes: Mapping[str, Any]) -> bool:
    """Whether a group's attributes are those of the log."""
    return isinstance(attributes.get("skipped"), dict) and isinstance(attributes.get("extract_seconds"), float | int)


def holds_plain_rows(folder: KeyValueStore, schema: Schema) -> bool:
    """Whether a store's shards are local files of uncompressed rows, which need no tensorstore."""
    return local_path(folder.url) is not None and schema.compressor is None


def layer_digest(encoded: Encoded, status: UInt8[np.ndarray, "rows"]) -> int:
    """CRC-32 of one layer of a shard, and of which of its rows are stored."""
    crc = 0
    for part in (status, encoded.values, encoded.scale):
        if part is not None:
            crc = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, crc)  # lets other threads run meanwhile
    return crc


def read_status(folder: KeyValueStore, schema: Schema, split: str, marks: str = "") -> UInt8[np.ndarray, "samples"]:
    """MISSING, STORED or SKIPPED for every row of a split; a mark that was never written reads as MISSING.

    Rows that came after `schema` was read are left out. `marks` is where the marks of layers under way lie.
    """
    name, expected = f"{marks}{split}/{STATUS}", shard_arrays(schema, split)[STATUS]
    status = folder.open_array(name, expected, missing_reads_as_zero=True, may_be_longer=True)
    if not (n := schema.splits[split].num_samples):
        return np.zeros(0, np.uint8)
    folder.require_all_regular(name)  # tensorstore reads all of its files, wherever they lead
    return np.asarray(wait([status[:n].read()], f"read {folder.place}{name}")[0])


def require_marks(folder: KeyValueStore) -> tuple[Schema, Marks]:
    """A store's schema and the marks of its splits, of one moment: they are read again where it grew in between.

    Raises:
        JobError: as of `require_store`.
    """
    schema = require_store(folder)
    while True:
        marks = {split: read_status(folder, schema, split) for split in schema.splits}
        now = require_store(folder)
        if now == schema:
            return schema, marks
        schema = now


def read_listed(read: Callable[[str], Listed], name: str) -> Listed:
    """A small array of a split, with an entry for every row, by its name and a method of the folder that reads it.

    While growth replaces it, the longer one can be read from its log; once that is gone, in its place again.

    Raises:
        JobError: it is missing or damaged.
    """
    refusals = []
    for place in (name, f"{NEXT}/{name}", name):
        try:
            return read(place)
        except OutageError:
            raise
        except JobError as error:
            refusals.append(error)
    raise refusals[0]


def holds_samples(folder: KeyValueStore, schema: Schema) -> bool:
    """Whether any shard of a store is committed."""
    return any((read_status(folder, schema, split) != MISSING).any() for split in schema.splits)


def open_schema(folder: KeyValueStore) -> Schema | None:
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
    if attributes is None:
        return None
    schema = Schema.parse(attributes, folder.place)
    require_listed(folder, schema)
    return schema


def require_listed(folder: KeyValueStore, schema: Schema) -> None:
    """Refuse a schema of more samples than a local store has bytes to list: marks are read for all of them at once.

    While a store grows, part of its listing lies in the log.

    Raises:
        JobError: there are fewer bytes than samples.
    """
    if local_path(folder.url) is None:
        return
    for split, info in schema.splits.items():
        files = [f"{split}/{name}" for name in ("sample_id/c/0", "sample_digest/c/0/0", "label/c/0", "label/c/0/0")]
        listed = sum(folder.require_regular(f"{log}{file}") or 0 for file in files for log in ("", f"{NEXT}/"))
        if info.num_samples > listed:
            raise JobError(
                f"{folder.place}zarr.json claims {info.num_samples:,} samples of {split}, which is more than "
                f"{listed:,} bytes of {split}/sample_id, sample_digest and label can list; {NEEDS_REPLACING}"
            )


def require_store(folder: KeyValueStore) -> Schema:
    """The schema of a store that must exist.

    Raises:
        JobError: there is no store, or its growth was interrupted.
    """
    schema = open_schema(folder)
    if schema is None:
        raise JobError(f"there is no store at {folder.place}; make one with `sidecache extract`")
    refuse_half_grown(folder)
    return schema


def refuse_half_grown(folder: KeyValueStore) -> None:
    """Raise JobError while a store's description and its arrays may disagree: a moment, unless the job was killed."""
    if folder.read_group(NEXT):
        raise JobError(
            f"the growth of {folder.place} was interrupted, or is under way; run the same `sidecache extract` again, "
            "which finishes it"
        )


def read_rms(folder: KeyValueStore, schema: Schema) -> dict[int, Float32[np.ndarray, "dim"]]:
    """The per-channel RMS of every layer, int8 stores only; else empty."""
    if schema.dtype != "int8":
        return {}
    found = {layer: folder.read_array(f"rms/{layer_name(layer)}") for layer in schema.layers}
    for layer, rms in found.items():
        if rms.dtype != np.float32 or rms.shape != (schema.dim,):
            name = f"rms/{layer_name(layer)}"
            raise JobError(
                f"{folder.place}{name} holds {rms.dtype} {rms.shape}, no {schema.dim} float32; {NEEDS_REPLACING}"
            )
    return found


def read_log(folder: KeyValueStore) -> dict[str, Any]:
    """The attributes of the `_log` group: costs by name, and `skipped`, id -> reason.

    Raises:
        JobError: they are others than those that jobs write.
    """
    log = folder.read_group(LOG) or {}
    costs = [cost for name, cost in log.items() if name != "skipped"]
    if not isinstance(log.get("skipped", {}), dict) or not all(
        type(c) in (int, float) and 0 <= c < 1e15 for c in costs
    ):
        raise JobError(f"{folder.place}{LOG}/zarr.json is not the log of a store; {NEEDS_REPLACING}")
    return log
