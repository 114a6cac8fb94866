"""Opens the store of a job: creates it, resumes it, or grows it by new samples or layers."""

from collections.abc import Mapping, Sequence

from rich.filesize import decimal

from extract.job.extraction_job import ExtractionJob
from extract.job.rms_calibration import calibrate
from store.address import free_disk_bytes
from store.arrays import holds_samples, open_schema, read_log
from store.compare import Samples, holds_all_samples, refuse_changed_samples
from store.dtypes import CODES
from store.errors import JobError
from store.growing.added_layers import begin_layers, read_added
from store.growing.growth import Known, finish_growth, grow
from store.kvstore import KeyValueStore
from store.listing import Listing, read_listing
from store.lock import Guard
from store.schema import Schema
from store.writer import StoreWriter, create_store, refuse_old_marks

_REMEDY = (
    "Only new samples of its classes can be added. Put the old ones back, choose another store.path, or extract all to "
    "a store beside this one: `sidecache extract --on-changed new-store`"
)


def open_or_create(
    kvstore: KeyValueStore,
    job: ExtractionJob,
    wanted: Schema,
    listings: Mapping[str, Listing],
    known: Known | None,
    lock: Guard,
) -> Schema:
    """The schema of a store that has all wanted samples, extracted or as missing shards, and the layers it had before.

    Args:
        wanted: the schema that the job asks for.
        known: the samples of the store when `job.source` was put in its order.

    Raises:
        OtherStoreError: the store was made from something else.
        JobError: another job has changed it since; there is no room; the disk refuses.
    """
    # finish an interrupted growth, and refuse a store that changed while the samples were listed
    finish_growth(kvstore, lock)
    stored = open_schema(kvstore)
    if stored != (known and known.schema):
        raise JobError(f"another job has changed {kvstore.place} in the meantime; run the same command again")
    # resume or grow a store that has samples
    if stored is not None and _has_committed(kvstore, stored):
        return _with_new_samples(kvstore, stored, wanted=wanted, listings=listings, lock=lock)
    if stored == wanted:
        return wanted
    # create it; a job that failed before its first shard leaves nothing worth keeping
    if stored is not None:
        kvstore.clear()
    require_space(kvstore, wanted, {split: list(wanted.shards(split)) for split in wanted.splits})
    rms = calibrate(job, wanted.layers) if wanted.dtype in CODES else {}
    tail = job.backbone.tail.arrays() if job.backbone.tail else {}
    create_store(kvstore, wanted, listings=listings, rms=rms, tail=tail)
    return wanted


def _has_committed(kvstore: KeyValueStore, stored: Schema) -> bool:
    """Whether a shard was ever committed, according to the log too: growth or repair may have removed all marks."""
    return holds_samples(kvstore, stored) or read_log(kvstore).get("extract_seconds", 0.0) > 0


def _with_new_samples(
    kvstore: KeyValueStore, stored: Schema, wanted: Schema, listings: Mapping[str, Listing], lock: Guard
) -> Schema:
    """The schema of the store after samples and splits that it does not have were added to it, if there are any."""
    if holds_all_samples(stored, wanted, kvstore.place):
        return stored
    held_listings = {s: read_listing(kvstore, s, stored.marks_validation(s)) for s in stored.splits}
    held = Samples(stored.classes, held_listings)
    refuse_changed_samples(held, Samples(wanted.classes, listings), kvstore.place, _REMEDY)
    provenance = stored.provenance.model_copy(update={"samples": wanted.provenance.samples})
    target = stored.model_copy(update={"splits": wanted.splits, "provenance": provenance})
    # a shard that is partly filled is extracted again, together with its new samples
    missing, writer = dict[str, list[int]](), StoreWriter(kvstore, stored)
    for split, info in stored.splits.items():
        grown = info.num_samples != target.splits[split].num_samples
        first_new = info.num_samples // stored.shard_samples if grown else len(stored.shards(split))
        missing_before = [shard for shard in writer.missing_shards(split) if shard < first_new]
        missing[split] = [*missing_before, *range(first_new, len(target.shards(split)))]
    for split in target.splits.keys() - stored.splits.keys():
        refuse_old_marks(kvstore, [split])
        missing[split] = list(target.shards(split))
    require_space(kvstore, target, missing)
    grow(kvstore, target, lock, listings)
    return target


def open_layers(
    kvstore: KeyValueStore, job: ExtractionJob, stored: Schema, layers: tuple[int, ...], lock: Guard
) -> Schema:
    """The schema of layers that are added to a complete store; for int8 and int4 they are calibrated first.

    Raises:
        JobError: there is no room; the disk refuses.
    """
    added = stored.model_copy(update={"layers": layers})
    if read_added(kvstore) != added:
        require_space(kvstore, added, {split: list(added.shards(split)) for split in added.splits})
        rms = calibrate(job, layers) if added.dtype in CODES else {}
        begin_layers(kvstore, stored, added, rms=rms, lock=lock)
    return added


def require_space(kvstore: KeyValueStore, schema: Schema, missing: Mapping[str, Sequence[int]]) -> None:
    """Raise JobError if the missing shards do not fit on the disk; compressed ones are not checked."""
    rows = sum(len(schema.shards(split).rows(shard)) for split, shards in missing.items() for shard in shards)
    n_bytes, free = rows * schema.bytes_per_sample, free_disk_bytes(kvstore.url)
    if free is not None and schema.compressor is None and n_bytes > free:
        raise JobError(
            f"{rows:,} samples need {decimal(n_bytes)} at {kvstore.place}, {decimal(n_bytes - free)} more than are "
            "free; store fewer layers (store.layers), fewer tokens (store.tokens) or fewer bytes a value "
            "(store.dtype: int8 or int4)"
        )
