"""Names and describes the arrays of a store, and reads its schema, status, RMS and log."""

import re
import zlib
from collections.abc import Mapping
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from store.address import local_path
from store.array_io import open_array, read_array
from store.dtypes import CODES, ENCODINGS, STORED_DTYPE, Encoded, stored_width
from store.errors import JobError, UserError
from store.io_errors import NEEDS_REPLACING
from store.kvstore import KeyValueStore, wait
from store.schema import AUGMENTED, Schema, require_version
from store.zarr_metadata import array_metadata, chunk_codecs, sharded

MISSING, STORED, SKIPPED = 0, 1, 2  # the values of a split's `status`; other than MISSING marks a row as committed
LOG, STATUS, DIGEST = "_log", "status", "shard_digest"
NEXT, ADDED = f"{LOG}/next", f"{LOG}/added"  # the redo log of a growing store; layers that are being added
LABEL, SAMPLE_ID, SAMPLE_DIGEST, VALIDATION = "label", "sample_id", "sample_digest", "validation"
_FILE_OF_STORE = re.compile(
    rf"zarr\.json.*|({LOG}|rms|tail)(/.*)?|"
    rf"(train|test|{AUGMENTED})(/(zarr\.json.*|(layer|scale)_\d+|{LABEL}|{SAMPLE_ID}|{SAMPLE_DIGEST}|{VALIDATION}|{STATUS}|{DIGEST}))?"
)
_MAX_COST = 1e15

Status = dict[str, UInt8[np.ndarray, "samples"]]  # by split


class MarkPlace(Enum):
    """Where commit marks (`status`) and shard digests are: in the store, or apart while layers are being added."""

    STORE = ""
    ADDED_LAYERS = f"{ADDED}/"

    def path(self, split: str, name: str) -> str:
        """The path of one of a split's arrays; values are in the store in either case."""
        return f"{self.value if name in (STATUS, DIGEST) else ''}{split}/{name}"


def layer_name(layer: int) -> str:
    """The array of a layer, such as `layer_03`: two digits, so that names sort as layers do."""
    return f"layer_{layer:02d}"


def scale_name(layer: int) -> str:
    """The array of the int8 scales of a layer's tokens, such as `scale_03`."""
    return f"scale_{layer:02d}"


def layer_arrays(schema: Schema, layer: int) -> list[str]:
    """The arrays that hold a layer: its values and, for int8, their scales."""
    return [layer_name(layer)] + ([scale_name(layer)] if schema.dtype == "int8" else [])


def shard_arrays(schema: Schema, split: str) -> dict[str, dict[str, Any]]:
    """Name -> metadata of a split's arrays that are written shard by shard, one file a shard."""
    n, shard = schema.splits[split].num_samples, schema.shard_samples
    dtype, n_tokens, width = schema.dtype, schema.token_layout.num_tokens, stored_width(schema.dtype, schema.dim)
    # values (samples, tokens, width) of each layer
    values = array_metadata(
        shape=(n, n_tokens, width),
        file_shape=(shard, n_tokens, width),
        dtype=STORED_DTYPE[dtype],
        dimension_names=["sample", "token", "dim"],
        codecs=sharded((1, n_tokens, width), schema.compressor, np.dtype(STORED_DTYPE[dtype]).itemsize),
        attributes={"encoding": ENCODINGS.get(dtype, dtype)},
    )
    arrays = {layer_name(layer): values for layer in schema.layers}
    # scales (samples, tokens) of each int8 layer
    if dtype == "int8":
        scale = array_metadata(
            shape=(n, n_tokens),
            file_shape=(shard, n_tokens),
            dtype="float32",
            dimension_names=["sample", "token"],
            codecs=sharded((1, n_tokens), None),
        )
        arrays |= {scale_name(layer): scale for layer in schema.layers}
    # commit marks (samples,), and a digest (shards, layers) of every layer of every shard
    arrays[STATUS] = array_metadata((n,), (shard,), "uint8", ["sample"], codecs=chunk_codecs(None))
    shape = (len(schema.shards(split)), len(schema.layers))
    arrays[DIGEST] = array_metadata(shape, (1, shape[1]), "uint32", ["shard", "layer"], codecs=chunk_codecs(None))
    return arrays


def shard_file(name: str, metadata: Mapping[str, Any], shard: int) -> str:
    """The key of one shard of an array that `shard_arrays` names, below its split."""
    return "/".join([name, "c", str(shard), *("0" for _ in metadata["shape"][1:])])


def layer_digest(encoded: Encoded, status: UInt8[np.ndarray, "rows"]) -> int:
    """CRC-32 of the status of a shard's rows and of one of its layers."""
    crc = 0
    for part in (status, encoded.values, encoded.scale):
        if part is not None:
            crc = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, crc)  # releases the GIL
    return crc


def holds_plain_rows(kvstore: KeyValueStore, schema: Schema) -> bool:
    """Whether a store's shards are local files of uncompressed rows, which need no tensorstore."""
    return local_path(kvstore.url) is not None and schema.compressor is None


def refuse_foreign_files(kvstore: KeyValueStore) -> None:
    """Refuse to create a store in a local folder with files that no store has.

    Raises:
        UserError: names such a file.
    """
    folder = local_path(kvstore.url)
    if folder is None or not folder.is_dir() or open_schema(kvstore) is not None:
        return
    for path in chain(folder.iterdir(), folder.glob("*/*")):  # in a folder of images the first one ends the loop
        name = path.relative_to(folder).as_posix()
        if not _FILE_OF_STORE.fullmatch(name) and not path.name.startswith(".") and name != "lost+found":
            raise UserError(
                f"{kvstore.place} is not a store, but has other files ({name!r}); choose another store.path"
            )


def open_schema(kvstore: KeyValueStore) -> Schema | None:
    """The schema of a store, or None where there is no store yet.

    Raises:
        UserError: there is something else, or a store of another format.
        JobError: the schema is damaged.
    """
    document = kvstore.read_json("zarr.json")
    if document is None:
        return None
    require_version(document.get("attributes"), kvstore.place)  # before the checksum: another format may have none
    attributes = kvstore.read_group("")
    if attributes is None:
        return None
    schema = Schema.parse(attributes, kvstore.place)
    require_listed(kvstore, schema)
    return schema


def require_listed(kvstore: KeyValueStore, schema: Schema) -> None:
    """Refuse a schema with more samples than a local store has bytes of ids, digests and labels.

    A forged number of samples would otherwise allocate memory for as many marks. While a store grows, a part of these
    files is in its redo log.

    Raises:
        JobError: there are fewer bytes than samples.
    """
    if local_path(kvstore.url) is None:
        return
    for split, info in schema.splits.items():
        chunks = (f"{SAMPLE_ID}/c/0", f"{SAMPLE_DIGEST}/c/0/0", f"{LABEL}/c/0", f"{LABEL}/c/0/0")
        files = [f"{place}{split}/{chunk}" for chunk in chunks for place in ("", f"{NEXT}/")]
        n_bytes = sum(kvstore.require_regular(file) or 0 for file in files)
        if info.num_samples > n_bytes:
            raise JobError(
                f"{kvstore.place}zarr.json claims {info.num_samples:,} samples of {split}, which is more than "
                f"{n_bytes:,} bytes of {split}/sample_id, sample_digest and label can list; {NEEDS_REPLACING}"
            )


def require_store(kvstore: KeyValueStore) -> Schema:
    """The schema of a store that must exist.

    Raises:
        JobError: there is no store, or its growth was interrupted.
    """
    schema = open_schema(kvstore)
    if schema is None:
        raise JobError(f"there is no store at {kvstore.place}; make one with `sidecache extract`")
    refuse_half_grown(kvstore)
    return schema


def refuse_half_grown(kvstore: KeyValueStore) -> None:
    """Raise JobError while a redo log is being applied, since schema and arrays may disagree then."""
    if kvstore.read_group(NEXT):
        raise JobError(
            f"the growth of {kvstore.place} was interrupted, or is under way; run the same `sidecache extract` again, "
            "which finishes it"
        )


def read_status(
    kvstore: KeyValueStore, schema: Schema, split: str, marks: MarkPlace = MarkPlace.STORE
) -> UInt8[np.ndarray, "samples"]:
    """MISSING, STORED or SKIPPED for every row of a split; rows that were added after `schema` was read are left out.

    A mark that was never written reads as MISSING.
    """
    name, metadata = marks.path(split, STATUS), shard_arrays(schema, split)[STATUS]
    status = open_array(kvstore, name, metadata, missing_reads_as_zero=True, may_be_longer=True)
    if not (n := schema.splits[split].num_samples):
        return np.zeros(0, np.uint8)
    kvstore.require_all_regular(name)  # tensorstore would follow links
    return np.asarray(wait([status[:n].read()], f"read {kvstore.place}{name}")[0])


def read_schema_and_status(kvstore: KeyValueStore) -> tuple[Schema, Status]:
    """A store's schema, and the status of all rows at the same moment: both are read again if it grew in between.

    Raises:
        JobError: as in `require_store`.
    """
    schema = require_store(kvstore)
    while True:
        status = {split: read_status(kvstore, schema, split) for split in schema.splits}
        current = require_store(kvstore)
        if current == schema:
            return schema, status
        schema = current


def holds_samples(kvstore: KeyValueStore, schema: Schema) -> bool:
    """Whether any shard of a store is committed."""
    return any((read_status(kvstore, schema, split) != MISSING).any() for split in schema.splits)


def read_rms(kvstore: KeyValueStore, schema: Schema) -> dict[int, Float32[np.ndarray, "dim"]]:
    """Layer -> per-channel RMS (dim,) of an int8 or int4 store; empty for other formats."""
    if schema.dtype not in CODES:
        return {}
    by_layer = {layer: read_array(kvstore, f"rms/{layer_name(layer)}") for layer in schema.layers}
    for layer, rms in by_layer.items():
        if rms.dtype != np.float32 or rms.shape != (schema.dim,):
            raise JobError(
                f"{kvstore.place}rms/{layer_name(layer)} is {rms.dtype} {rms.shape}, should be float32 "
                f"({schema.dim},); {NEEDS_REPLACING}"
            )
    return by_layer


def is_log(attributes: Mapping[str, Any]) -> bool:
    """Whether these are attributes of a log: `skipped`, sample id -> reason, and costs by name."""
    costs = [value for name, value in attributes.items() if name != "skipped"]
    return (
        isinstance(attributes.get("skipped"), dict)
        and "extract_seconds" in attributes
        and all(type(cost) in (int, float) and 0 <= cost < _MAX_COST for cost in costs)
    )


def read_log(kvstore: KeyValueStore) -> dict[str, Any]:
    """The attributes of the log, as `is_log` describes them; empty where it is missing.

    Raises:
        JobError: it is damaged, or something else.
    """
    log = kvstore.read_group(LOG)
    if log is not None and not is_log(log):
        raise JobError(f"{kvstore.place}{LOG}/zarr.json is not the log of a store; {NEEDS_REPLACING}")
    return log or {}
