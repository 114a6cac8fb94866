"""How a store grows: what it says of itself and its arrays change as one, whatever is killed when.

New samples come behind those that are there, so shards that are full stay as they are, and one that was part-filled
loses its mark and is extracted again. From then on the store is one that lacks some shards, like any other.

A redo log makes the change one. What is to be is staged below `_log/next`, whose group comes last: it is the decision.
What follows can be repeated from the log alone, and is, by the next job that holds the lock; until then nobody can open
the store, and who has it open reads on. A log without its group was never decided upon, and is dropped.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32

from store.address import local_path
from store.arrays import ADDED, DIGEST, MISSING, NEXT, open_schema, require_listed, shard_arrays
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING
from store.kvstore import KeyValueStore, wait
from store.lock import Guard
from store.schema import Schema
from store.writer import Listing, StoreWriter, read_listing, write_listing


@dataclass(frozen=True)
class Known:
    """What a store holds, or will when its growth is finished: the ids of every split, in the order of its rows."""

    schema: Schema
    ids: Mapping[str, Sequence[str]]


def read_known(folder: KeyValueStore) -> Known | None:
    """The samples that a store knows; None where there is no store.

    Raises:
        UserError: what lies there is something else, or of another format.
        JobError: it is damaged.
    """
    before, now = None, _read_schemas(folder)
    while now != before:  # another job lets it grow
        before, failed = now, None
        try:
            known = _read_known(folder, *before)
        except JobError as error:
            known, failed = None, error
        now = _read_schemas(folder)
    if failed:
        raise failed
    return known


def _read_schemas(folder: KeyValueStore) -> tuple[Schema | None, Schema | None]:
    """What a store is to say of itself, where a growth is decided; and what it says."""
    return _read_decided(folder), open_schema(folder)


def _read_known(folder: KeyValueStore, decided: Schema | None, stored: Schema | None) -> Known | None:
    schema = decided or stored
    if schema is None:
        return None
    staged = {split: f"{NEXT}/{split}/" for split in schema.splits if decided and _is_staged(folder, split, "label")}
    ids = {split: folder.read_strings(f"{staged.get(split, f'{split}/')}sample_id") for split in schema.splits}
    return Known(schema, ids)


def grow(
    folder: KeyValueStore,
    target: Schema,
    lock: Guard,
    listings: Mapping[str, Listing] | None = None,
    digests: Mapping[str, UInt32[np.ndarray, "shards layers"]] | None = None,
) -> None:
    """Make a store one of more samples, or of layers that lie there whole.

    Args:
        target: what it is to say of itself.
        listings: of all splits, where there are more samples: those that it holds first, as they are.
        digests: of every split, where there are more layers: `shard_digest` of all layers.

    Raises:
        JobError: the disk refused, or another job took the store over; the same call, or `finish_growth`, goes on.
    """
    drop_undecided(folder)
    for split, listing in (listings or {}).items():
        write_listing(folder, f"{NEXT}/{split}", listing)
    for split, values in (digests or {}).items():
        folder.write_array(f"{NEXT}/{split}/{DIGEST}", values, ["shard", "layer"])
    lock.check()
    folder.write_group(NEXT, {"schema": target.model_dump(mode="json")})
    finish_growth(folder, lock)


def finish_growth(folder: KeyValueStore, lock: Guard) -> None:
    """Carry out what was decided, if anything was; it can be repeated at any point.

    Raises:
        JobError: the disk refused, or another job took the store over.
    """
    target, stored = _read_decided(folder), open_schema(folder)
    if target is not None and stored is not None and target != stored:
        for split in target.splits:
            lock.check()
            if _is_staged(folder, split, "label"):
                _extend(folder, stored, target, split, lock)
            if _is_staged(folder, split, DIGEST):
                _replace_digests(folder, target, split)
        lock.check()
        folder.write_group("", target.model_dump(mode="json"))
    if target is not None and any(_is_staged(folder, split, DIGEST) for split in target.splits):
        remove_all(folder, ADDED)  # their marks have become the store's
    if target is not None:
        folder.write_group(NEXT, {})  # done: whatever of the log is gone from now on is not missed
    drop_undecided(folder)


def drop_undecided(folder: KeyValueStore) -> None:
    """Delete a log that decides nothing, or nothing any more."""
    if folder.has_keys(NEXT):
        remove_all(folder, NEXT)


def remove_all(folder: KeyValueStore, name: str) -> None:
    """Delete all that lies below a name, empty folders too: they would puzzle Zarr readers."""
    folder.remove(name)
    if path := local_path(folder.url):
        shutil.rmtree(path / name, ignore_errors=True)


def _read_decided(folder: KeyValueStore) -> Schema | None:
    attributes = folder.read_group(NEXT)
    if not attributes:
        return None
    decided, stored = Schema.parse(attributes.get("schema", {}), f"{folder.place}{NEXT}"), open_schema(folder)
    require_listed(folder, decided)
    if stored is not None and decided.splits.keys() != stored.splits.keys():
        raise JobError(
            f"{folder.place}{NEXT}/zarr.json is no growth of this store, its splits are others; {NEEDS_REPLACING}"
        )
    return decided


def _is_staged(folder: KeyValueStore, split: str, name: str) -> bool:
    return folder.read_node(f"{NEXT}/{split}/{name}") is not None


def _extend(folder: KeyValueStore, stored: Schema, target: Schema, split: str, lock: Guard) -> None:
    """Longer arrays, the listing, and no mark on a shard that was part-filled.

    The mark goes as a write of zeros over all of the longer shard, once that is its array's shape: what lies behind the
    old end is then MISSING too, and durably so. The shard's files stay until they are replaced by longer ones, in one
    step each: whoever has the store open since before goes on reading its rows from either.
    """
    for name, metadata in shard_arrays(target, split).items():
        folder.write_node(f"{split}/{name}", metadata)
    before = stored.splits[split].num_samples
    full, part = divmod(before, stored.shard_samples)
    if part and target.splits[split].num_samples > before:
        rows = target.shards(split).rows(full)
        StoreWriter(folder, target, lock).mark(split, full, np.full(len(rows), MISSING, np.uint8))
    write_listing(folder, split, read_listing(folder, f"{NEXT}/{split}"))


def _replace_digests(folder: KeyValueStore, target: Schema, split: str) -> None:
    values = folder.read_array(f"{NEXT}/{split}/{DIGEST}")
    array = folder.create_array(f"{split}/{DIGEST}", shard_arrays(target, split)[DIGEST])
    wait([array.write(values)], f"write {folder.place}{split}/{DIGEST}")
