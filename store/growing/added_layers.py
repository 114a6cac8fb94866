"""Layers on their way into a store that is complete: it stays whole and readable until they all are in.

Their values go to the places that they will keep, which readers do not look at; their marks, digests and description
lie below `_log/added`. When every shard is marked, one step of growth makes them layers of the store.
"""

import numpy as np
from jaxtyping import Float32, UInt32

from store.arrays import ADDED, DIGEST, MARKS, layer_arrays, layer_name, read_status, shard_arrays
from store.errors import JobError
from store.growing.growth import grow, remove_all
from store.kvstore import KeyValueStore, wait
from store.lock import Guard
from store.schema import Schema

MARKS_OF_ADDED = f"{ADDED}/"


def read_added(folder: KeyValueStore) -> Schema | None:
    """The schema of the layers under way, and of them alone; None where there are none, or not ready to be written."""
    attributes = folder.read_group(ADDED) or {}
    return Schema.parse(attributes.get("schema", {}), f"{folder.place}{ADDED}") if attributes.get("ready") else None


def names_of_added(folder: KeyValueStore) -> tuple[str, ...]:
    """Where layers under way lie: no key below these names is part of the store."""
    attributes = folder.read_group(ADDED)
    return (
        (ADDED,) if attributes is None else (ADDED, *_places(Schema.parse(attributes.get("schema", {}), folder.place)))
    )


def begin_layers(
    folder: KeyValueStore, stored: Schema, added: Schema, rms: dict[int, Float32[np.ndarray, "dim"]], lock: Guard
) -> None:
    """Make places for layers of all samples of a store; others that were under way are given up.

    Args:
        added: the store's schema, with the layers that it lacks in the place of its own.
        rms: of these layers, int8 stores only.

    Raises:
        JobError: the disk refused, or another job took the store over.
    """
    lock.check()
    _give_up(folder, stored)
    document = {"schema": added.model_dump(mode="json"), "ready": False}
    folder.write_group(ADDED, document)  # first, so that whatever comes can be given up
    for layer, values in rms.items():
        folder.write_array(f"rms/{layer_name(layer)}", values, ["channel"])
    for split in added.splits:
        folder.write_group(f"{ADDED}/{split}", {})
        for name, metadata in shard_arrays(added, split).items():
            folder.write_node(f"{ADDED}/{split}/{name}" if name in MARKS else f"{split}/{name}", metadata)
    lock.check()
    folder.write_group(ADDED, {**document, "ready": True})


def finish_layers(folder: KeyValueStore, stored: Schema, added: Schema, lock: Guard) -> Schema:
    """Make layers whose shards are all marked part of the store, and return its new schema.

    Raises:
        JobError: other samples than before cannot be decoded; the disk refused, or another job took the store over.
    """
    for split in stored.splits:
        _require_same_marks(folder, stored, added, split)
    layers = sorted({*stored.layers, *added.layers})
    target = stored.model_copy(update={"layers": tuple(layers)})
    grow(folder, target, lock, digests={s: _merged_digests(folder, stored, added, s) for s in stored.splits})
    return target


def _give_up(folder: KeyValueStore, stored: Schema) -> None:
    """Drop layers under way: they are not ready any more, then their values go, and last what says where these lie."""
    attributes = folder.read_group(ADDED)
    if attributes is not None:
        given_up = Schema.parse(attributes.get("schema", {}), f"{folder.place}{ADDED}")
        folder.write_group(ADDED, {**attributes, "ready": False})  # else a job that is killed here leaves half of them
        kept = set(_places(stored))
        for place in _places(given_up):
            if place not in kept:
                remove_all(folder, place)
    remove_all(folder, ADDED)


def _places(schema: Schema) -> list[str]:
    """The arrays of a schema's layers."""
    names = [name for layer in schema.layers for name in layer_arrays(schema, layer)]
    rms = [f"rms/{layer_name(layer)}" for layer in schema.layers] if schema.dtype == "int8" else []
    return [*rms, *(f"{split}/{name}" for split in schema.splits for name in names)]


def _require_same_marks(folder: KeyValueStore, stored: Schema, added: Schema, split: str) -> None:
    before, now = read_status(folder, stored, split), read_status(folder, added, split, MARKS_OF_ADDED)
    if (different := np.flatnonzero(before != now)).size:
        sample = folder.read_strings(f"{split}/sample_id")[different[0]]
        raise JobError(
            f"{different.size} samples of {split} in {folder.place} could be decoded for its layers {stored.layers} "
            f"and not for {added.layers}, or the other way round; the first is {sample!r}. Has the library that "
            "decodes them changed? Extract all layers to a new store.path"
        )


def _merged_digests(
    folder: KeyValueStore, stored: Schema, added: Schema, split: str
) -> UInt32[np.ndarray, "shards layers"]:
    """`shard_digest` of both, its columns in the order of the layers."""
    parts = [
        folder.open_array(f"{place}{split}/{DIGEST}", shard_arrays(schema, split)[DIGEST])
        for schema, place in ((stored, ""), (added, MARKS_OF_ADDED))
    ]
    columns = wait([part.read() for part in parts], f"read the digests of {folder.place}{split}")
    order = np.argsort([*stored.layers, *added.layers])
    return np.concatenate([np.asarray(part) for part in columns], axis=1)[:, order]
