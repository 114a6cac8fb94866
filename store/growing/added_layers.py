"""Adds layers to a complete store, which stays readable until all of them are written.

Their values are written to their final places, which readers ignore until the schema lists them. Their marks, digests
and schema are below `_log/added`. When every shard is marked, one step of growth makes them layers of the store.
"""

import numpy as np
from jaxtyping import Float32, UInt32

from store.array_io import open_array, read_strings, write_array
from store.arrays import (
    ADDED,
    DIGEST,
    SAMPLE_ID,
    MarkPlace,
    layer_arrays,
    layer_name,
    read_status,
    shard_arrays,
)
from store.dtypes import CODES
from store.errors import JobError
from store.growing.growth import grow, remove_all
from store.kvstore import KeyValueStore, wait
from store.lock import Guard
from store.schema import Schema


def read_added(kvstore: KeyValueStore) -> Schema | None:
    """The schema of the layers that are being added, with only these; None if there are none that can be written."""
    attributes = kvstore.read_group(ADDED) or {}
    return Schema.parse(attributes.get("schema", {}), f"{kvstore.place}{ADDED}") if attributes.get("ready") else None


def names_of_added(kvstore: KeyValueStore) -> tuple[str, ...]:
    """Names below which layers that are being added are; keys there are not part of the store."""
    attributes = kvstore.read_group(ADDED)
    if attributes is None:
        return (ADDED,)
    return (ADDED, *_layer_paths(Schema.parse(attributes.get("schema", {}), kvstore.place)))


def begin_layers(
    kvstore: KeyValueStore, stored: Schema, added: Schema, rms: dict[int, Float32[np.ndarray, "dim"]], lock: Guard
) -> None:
    """Create the arrays of layers to add, for all samples of a store; other layers that were being added are removed.

    Args:
        added: the store's schema with only the missing layers.
        rms: of these layers, int8 and int4 stores only.

    Raises:
        JobError: the disk refused, or the lock is lost.
    """
    lock.check()
    _remove_added(kvstore, stored)
    document = {"schema": added.model_dump(mode="json"), "ready": False}
    kvstore.write_group(ADDED, document)  # first, so that `_remove_added` finds everything that follows
    for layer, values in rms.items():
        write_array(kvstore, f"rms/{layer_name(layer)}", values, ["channel"])
    for split in added.splits:
        kvstore.write_group(f"{ADDED}/{split}", {})
        for name, metadata in shard_arrays(added, split).items():
            kvstore.write_node(MarkPlace.ADDED_LAYERS.path(split, name), metadata)
    lock.check()
    kvstore.write_group(ADDED, {**document, "ready": True})


def finish_layers(kvstore: KeyValueStore, stored: Schema, added: Schema, lock: Guard) -> Schema:
    """Make layers whose shards are all marked part of the store, and return its new schema.

    Raises:
        JobError: other samples were skipped than for the stored layers; the disk refused, or the lock is lost.
    """
    for split in stored.splits:
        _require_same_status(kvstore, stored, added, split)
    layers = sorted({*stored.layers, *added.layers})
    target = stored.model_copy(update={"layers": tuple(layers)})
    grow(kvstore, target, lock, digests={s: _merge_digests(kvstore, stored, added, s) for s in stored.splits})
    return target


def _remove_added(kvstore: KeyValueStore, stored: Schema) -> None:
    """Remove layers that are being added: first their readiness, then their values, last the schema that lists them.

    A job that is killed in between leaves layers that are not ready, so they are never written to.
    """
    attributes = kvstore.read_group(ADDED)
    if attributes is not None:
        schema = Schema.parse(attributes.get("schema", {}), f"{kvstore.place}{ADDED}")
        kvstore.write_group(ADDED, {**attributes, "ready": False})
        stored_paths = set(_layer_paths(stored))
        for path in _layer_paths(schema):
            if path not in stored_paths:
                remove_all(kvstore, path)
    remove_all(kvstore, ADDED)


def _layer_paths(schema: Schema) -> list[str]:
    """The paths of the arrays of a schema's layers."""
    names = [name for layer in schema.layers for name in layer_arrays(schema, layer)]
    rms = [f"rms/{layer_name(layer)}" for layer in schema.layers] if schema.dtype in CODES else []
    return [*rms, *(f"{split}/{name}" for split in schema.splits for name in names)]


def _require_same_status(kvstore: KeyValueStore, stored: Schema, added: Schema, split: str) -> None:
    """Refuse added layers if other samples were skipped than for the stored ones."""
    status = read_status(kvstore, stored, split)
    status_of_added = read_status(kvstore, added, split, MarkPlace.ADDED_LAYERS)
    if (different := np.flatnonzero(status != status_of_added)).size:
        sample = read_strings(kvstore, f"{split}/{SAMPLE_ID}")[different[0]]
        raise JobError(
            f"{different.size} samples of {split} in {kvstore.place} could be decoded for its layers {stored.layers} "
            f"and not for {added.layers}, or the other way round; the first is {sample!r}. Has the library that "
            "decodes them changed? Extract all layers to a new store.path"
        )


def _merge_digests(
    kvstore: KeyValueStore, stored: Schema, added: Schema, split: str
) -> UInt32[np.ndarray, "shards layers"]:
    """`shard_digest` of stored and added layers, its columns in the order of the layers."""
    parts = [
        open_array(kvstore, marks.path(split, DIGEST), shard_arrays(schema, split)[DIGEST])
        for schema, marks in ((stored, MarkPlace.STORE), (added, MarkPlace.ADDED_LAYERS))
    ]
    columns = wait([part.read() for part in parts], f"read the digests of {kvstore.place}{split}")
    order = np.argsort([*stored.layers, *added.layers])
    return np.concatenate([np.asarray(part) for part in columns], axis=1)[:, order]
