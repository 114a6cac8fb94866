"""Opens the store of a job, or creates it, or lets it grow."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from rich.filesize import decimal

from extract.config import DataConfig
from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import FrozenForward
from extract.job.shard import report_failures
from extract.sources.open_source import ImageSource, ImageSplit
from store.address import free_disk_bytes
from store.arrays import holds_samples, open_schema, read_log
from store.compare import Samples, holds_all_samples, refuse_changed_samples
from store.console.progress import progress
from store.dtypes import channel_rms
from store.errors import JobError
from store.growing.added_layers import begin_layers, read_added
from store.growing.growth import Known, finish_growth, grow
from store.kvstore import KeyValueStore
from store.layout import in_groups
from store.listing import Listing, read_listing
from store.lock import Guard
from store.schema import Schema
from store.writer import StoreWriter, create_store

_REMEDY = (
    "Only new samples of its classes can be added. Put the old ones back, choose another store.path, or extract all to "
    "a store beside this one: `sidecache extract --on-changed new-store`"
)
CALIBRATION_SAMPLES = 32  # they go through the backbone twice; the error of int8 is the same from 8 to 256 of them


def open_or_create(
    folder: KeyValueStore,
    wanted: Schema,
    source: ImageSource,
    forward: FrozenForward,
    listings: Mapping[str, Listing],
    data: DataConfig,
    lock: Guard,
    known: Known | None,
) -> Schema:
    """The schema of a store that holds, or lacks as shards, all of the wanted samples; of layers those that it had.

    Args:
        known: what the samples were put in order by.

    Raises:
        OtherStoreError: the store was made from something else.
        JobError: another job has changed it meanwhile; there is no room; the disk refuses.
    """
    finish_growth(folder, lock)
    stored = open_schema(folder)
    if stored != (known and known.schema):
        raise JobError(f"another job has changed {folder.place} in the meantime; run the same command again")
    if stored is not None and _was_begun(folder, stored):
        return _with_new_samples(folder, stored, wanted, listings, lock)
    if stored == wanted:
        return wanted
    if stored is not None:  # left by a job that failed before its first shard: there is nothing in it to lose
        folder.clear()
    require_space(folder, wanted, {split: list(wanted.shards(split)) for split in wanted.splits})
    rms = _calibrate(source.splits["train"], forward, data) if wanted.dtype == "int8" else {}
    tail = forward.backbone.tail.arrays() if forward.backbone.tail else {}
    create_store(folder, wanted, listings, rms, tail)
    return wanted


def _was_begun(folder: KeyValueStore, stored: Schema) -> bool:
    """Whether a shard was ever committed; growth or repair may have taken back all marks of a small store."""
    return holds_samples(folder, stored) or read_log(folder).get("extract_seconds", 0.0) > 0


def _with_new_samples(
    folder: KeyValueStore, stored: Schema, wanted: Schema, listings: Mapping[str, Listing], lock: Guard
) -> Schema:
    if holds_all_samples(stored, wanted, folder.place):
        return stored
    held = Samples(stored.classes, {split: read_listing(folder, split) for split in stored.splits})
    refuse_changed_samples(held, Samples(wanted.classes, listings), folder.place, _REMEDY)
    provenance = stored.provenance.model_copy(update={"samples": wanted.provenance.samples})
    target = stored.model_copy(update={"splits": wanted.splits, "provenance": provenance})
    lacking, writer = dict[str, list[int]](), StoreWriter(folder, stored)
    for split, info in stored.splits.items():
        grown = info.num_samples != target.splits[split].num_samples
        first_new = info.num_samples // stored.shard_samples if grown else len(stored.shards(split))
        missing = [shard for shard in writer.missing_shards(split) if shard < first_new]
        lacking[split] = [*missing, *range(first_new, len(target.shards(split)))]
    require_space(folder, target, lacking)
    grow(folder, target, lock, listings)
    return target


def open_layers(
    folder: KeyValueStore, stored: Schema, split: ImageSplit, forward: FrozenForward, data: DataConfig, lock: Guard
) -> Schema:
    """The schema of the layers that are added to a store that is complete: those of `forward`.

    Args:
        split: the training samples, by which int8 is calibrated, for these layers alone.

    Raises:
        JobError: there is no room; the disk refuses.
    """
    added = stored.model_copy(update={"layers": forward.layers})
    if read_added(folder) != added:
        require_space(folder, added, {split: list(added.shards(split)) for split in added.splits})
        rms = _calibrate(split, forward, data) if added.dtype == "int8" else {}
        begin_layers(folder, stored, added, rms, lock)
    return added


def _calibrate(split: ImageSplit, forward: FrozenForward, data: DataConfig) -> dict[int, np.ndarray]:
    """Per-channel RMS of every layer from a few training samples, drawn by a fixed hash of their ids."""
    order = sorted(range(len(split)), key=lambda row: hashlib.blake2b(split.ids[row].encode()).digest())
    rows = sorted(order[:CALIBRATION_SAMPLES])
    squares: dict[int, list[np.ndarray]] = {layer: [] for layer in forward.layers}  # (dim,) of every sample
    with progress("calibrating int8", len(rows), "samples") as advance:
        for batch in forward.batches(split, in_groups(rows, forward.batch_size(len(rows)))):
            report_failures(batch, split, data.on_error == "skip")
            if batch.images is not None:
                tokens = forward(batch.images)
                Encoding(tokens, [split.ids[row] for row in batch.rows], "float32", {}).result()  # no NaN, no infinity
                for layer, values in tokens.items():
                    squares[layer].extend(values.double().square().mean(dim=1).cpu().numpy())
            advance(len(batch.rows) + len(batch.failed))
    if not any(squares.values()):
        raise JobError("none of the training samples can be decoded, so the int8 format cannot be calibrated")
    return {layer: channel_rms(np.mean(means, axis=0)) for layer, means in squares.items()}


def require_space(folder: KeyValueStore, schema: Schema, missing: Mapping[str, Sequence[int]]) -> None:
    """Refuse a job that cannot fit, before it starts."""
    rows = sum(len(schema.shards(split).rows(shard)) for split, shards in missing.items() for shard in shards)
    n_bytes, free = rows * schema.bytes_per_sample, free_disk_bytes(folder.url)
    if free is not None and schema.compressor is None and n_bytes > free:
        raise JobError(
            f"{rows:,} samples need {decimal(n_bytes)} at {folder.place}, {decimal(n_bytes - free)} more than are "
            "free; store fewer layers (store.layers), fewer tokens (store.tokens) or one byte a value "
            "(store.dtype: int8)"
        )
