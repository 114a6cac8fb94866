"""Grows a store: its schema and arrays change in one atomic step, also if the job is killed at any moment.

New samples follow the existing ones, so full shards stay as they are. A part-filled last shard loses its mark and is
extracted again. A split that the store does not have yet is created without tokens. After that the store is like any
other that lacks some shards.

A redo log makes the step atomic. All changes are staged below `_log/next`; writing this group, which comes last,
commits them. Applying a committed log can be repeated, so the next job that holds the lock finishes it. Until then the
store cannot be opened, but programs that have it open go on reading. A log without its group was never committed, and
is deleted.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32

from store.address import local_path
from store.array_io import create_array, read_array, read_strings, write_array
from store.arrays import (
    ADDED,
    DIGEST,
    LABEL,
    MISSING,
    NEXT,
    SAMPLE_ID,
    open_schema,
    require_listed,
    shard_arrays,
)
from store.config import SPLITS
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING
from store.kvstore import KeyValueStore, wait
from store.listing import Listing, read_listing, write_listing
from store.lock import Guard
from store.schema import Schema
from store.writer import StoreWriter, create_split


@dataclass(frozen=True)
class Known:
    """The schema of a store and the sample ids of every split in row order, a committed redo log included."""

    schema: Schema
    ids: Mapping[str, Sequence[str]]


def read_known(kvstore: KeyValueStore) -> Known | None:
    """The schema and sample ids of a store, read at one moment; None if there is no store.

    Raises:
        UserError: there is something else, or a store of another format.
        JobError: it is damaged.
    """
    previous, schemas = None, _read_schemas(kvstore)
    while schemas != previous:  # read again if another job grows the store in the meantime
        previous, failure = schemas, None
        try:
            known = _read_known(kvstore, *schemas)
        except JobError as error:
            known, failure = None, error
        schemas = _read_schemas(kvstore)
    if failure:
        raise failure
    return known


def _read_schemas(kvstore: KeyValueStore) -> tuple[Schema | None, Schema | None]:
    """The schema of a committed redo log, if any, and the store's current one."""
    return _read_committed(kvstore), open_schema(kvstore)


def _read_known(kvstore: KeyValueStore, committed: Schema | None, stored: Schema | None) -> Known | None:
    schema = committed or stored
    if schema is None:
        return None
    ids = {}
    for split in schema.splits:
        place = f"{NEXT}/{split}" if committed and _is_staged(kvstore, split, LABEL) else split
        ids[split] = read_strings(kvstore, f"{place}/{SAMPLE_ID}")
    return Known(schema, ids)


def grow(
    kvstore: KeyValueStore,
    target: Schema,
    lock: Guard,
    listings: Mapping[str, Listing] | None = None,
    digests: Mapping[str, UInt32[np.ndarray, "shards layers"]] | None = None,
) -> None:
    """Change a store to a target schema: with more samples or splits, or more layers whose values are written already.

    Args:
        listings: of all splits, if there are more samples or splits: the stored ones first, unchanged.
        digests: of every split, if there are more layers: `shard_digest` of all layers.

    Raises:
        JobError: the disk refused, or the lock is lost; the same call, or `finish_growth`, goes on.
    """
    drop_redo_log(kvstore)
    # stage
    for split, listing in (listings or {}).items():
        write_listing(kvstore, f"{NEXT}/{split}", listing)
    for split, values in (digests or {}).items():
        write_array(kvstore, f"{NEXT}/{split}/{DIGEST}", values, ["shard", "layer"])
    # commit, then apply
    lock.check()
    kvstore.write_group(NEXT, {"schema": target.model_dump(mode="json")})
    finish_growth(kvstore, lock)


def finish_growth(kvstore: KeyValueStore, lock: Guard) -> None:
    """Apply a committed redo log, if there is one, and delete it; can be repeated at any point.

    Raises:
        JobError: the disk refused, or the lock is lost.
    """
    target, stored = _read_committed(kvstore), open_schema(kvstore)
    if target is not None and stored is not None and target != stored:
        for split in target.splits:
            lock.check()
            if split not in stored.splits:
                create_split(kvstore, target, split, _read_staged(kvstore, target, split))
            elif _is_staged(kvstore, split, LABEL):
                _extend(kvstore, stored, target, split=split, lock=lock)
            if _is_staged(kvstore, split, DIGEST):
                _replace_digests(kvstore, target, split)
        lock.check()
        kvstore.write_group("", target.model_dump(mode="json"))
    if target is not None and any(_is_staged(kvstore, split, DIGEST) for split in target.splits):
        remove_all(kvstore, ADDED)  # these layers are part of the store now
    if target is not None:
        kvstore.write_group(NEXT, {})  # fully applied: an empty group is not committed
    drop_redo_log(kvstore)


def drop_redo_log(kvstore: KeyValueStore) -> None:
    """Delete a redo log that was never committed or is fully applied."""
    if kvstore.has_keys(NEXT):
        remove_all(kvstore, NEXT)


def remove_all(kvstore: KeyValueStore, name: str) -> None:
    """Delete everything below a name, also empty folders, which would confuse Zarr readers."""
    kvstore.remove(name)
    if path := local_path(kvstore.url):
        shutil.rmtree(path / name, ignore_errors=True)


def _read_committed(kvstore: KeyValueStore) -> Schema | None:
    """The target schema of a committed redo log; None if there is none."""
    attributes = kvstore.read_group(NEXT)
    if not attributes:
        return None
    target, stored = Schema.parse(attributes.get("schema", {}), f"{kvstore.place}{NEXT}"), open_schema(kvstore)
    require_listed(kvstore, target)
    if stored is not None and not stored.splits.keys() <= target.splits.keys() <= {*stored.splits, *SPLITS}:
        raise JobError(
            f"{kvstore.place}{NEXT}/zarr.json does not fit this store: its splits are others; {NEEDS_REPLACING}"
        )
    return target


def _is_staged(kvstore: KeyValueStore, split: str, name: str) -> bool:
    return kvstore.read_node(f"{NEXT}/{split}/{name}") is not None


def _extend(kvstore: KeyValueStore, stored: Schema, target: Schema, split: str, lock: Guard) -> None:
    """Make the arrays of a split longer, unmark its part-filled shard, and replace the listing.

    The mark is removed by writing zeros over all rows of the longer shard, after its array has the new shape: rows
    beyond the old end are then durably MISSING too. The shard's files stay until each is replaced by a longer one in
    one step, so that a program that has the store open can read its rows from either.
    """
    for name, metadata in shard_arrays(target, split).items():
        kvstore.write_node(f"{split}/{name}", metadata)
    n_before = stored.splits[split].num_samples
    n_full, remainder = divmod(n_before, stored.shard_samples)
    if remainder and target.splits[split].num_samples > n_before:
        rows = target.shards(split).rows(n_full)
        StoreWriter(kvstore, target, lock).mark(split, n_full, np.full(len(rows), MISSING, np.uint8))
    write_listing(kvstore, split, _read_staged(kvstore, target, split))


def _read_staged(kvstore: KeyValueStore, target: Schema, split: str) -> Listing:
    return read_listing(kvstore, f"{NEXT}/{split}", target.marks_validation(split))


def _replace_digests(kvstore: KeyValueStore, target: Schema, split: str) -> None:
    values = read_array(kvstore, f"{NEXT}/{split}/{DIGEST}")
    array = create_array(kvstore, f"{split}/{DIGEST}", shard_arrays(target, split)[DIGEST])
    wait([array.write(values)], f"write {kvstore.place}{split}/{DIGEST}")
