"""Runs an extraction: finds the missing shards of a store, computes them with the frozen backbone and commits them."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from extract.forward.threads import thread_pool
from extract.job.extraction_job import ExtractionJob
from extract.job.open_store import open_layers, open_or_create, require_space
from extract.job.repeated_samples import note_repeated_samples
from extract.job.shard_extractor import ExtractedShard, ShardExtractor
from extract.job.store_schema import list_splits, schema_of
from extract.sources.store_order import in_store_order
from store.address import store_url
from store.arrays import NEXT, STORED, MarkPlace, holds_samples, open_schema, read_rms, refuse_foreign_files
from store.compare import holds_all_samples
from store.config import SPLITS
from store.console.progress import progress
from store.growing.added_layers import finish_layers
from store.growing.growth import read_known
from store.kvstore import KeyValueStore
from store.lock import Lock, hold, remove_dead
from store.reader import Store, open_store
from store.schema import Schema
from store.writer import StoreWriter

ShardsBySplit = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """The result of one run of the job.

    Attributes:
        path: of the store, as configured.
        samples_written: a sample that was also extracted for added layers counts again.
        retries: how many shards were started again because a worker failed or was lost.
    """

    store: Store
    path: str
    shards_written: int
    samples_written: int
    seconds: float
    retries: int = 0


def extract_tokens(job: ExtractionJob, damaged: ShardsBySplit | None = None) -> Extraction:
    """Complete a store: extract its missing shards only, none if it is complete.

    Samples, layers and splits that the store does not have yet are added to it (docs/growing.md).

    Args:
        damaged: shards to extract again. They are marked as missing once the store is known to be this job's.

    Raises:
        ChangedError: samples that the store holds are gone or changed.
        UserError: the store was made from something else; a sample cannot be decoded (`on_error: fail`).
        JobError: a value cannot be stored, the disk refuses or is too small, another job is running on the store.
    """
    started = time.perf_counter()
    # refuse an unusable folder before the samples are listed
    kvstore = KeyValueStore(store_url(job.store.path))
    refuse_foreign_files(kvstore)
    # list the samples, those that the store already holds first
    known = read_known(kvstore)
    stored_ids = known.ids if known else {}
    left_out = set(SPLITS).difference(job.store.splits, stored_ids)  # a split that the store has stays part of it
    job = replace(job, source=in_store_order(job.source.without(left_out), stored_ids))
    listings = list_splits(job.source.splits)
    note_repeated_samples(listings, job.source.views)
    wanted = schema_of(job, listings)
    written = _Written()
    if damaged or not _is_complete(kvstore, wanted):
        with hold(kvstore) as lock:
            schema = open_or_create(kvstore, job, wanted=wanted, listings=listings, known=known, lock=lock)
            for split, shards in (damaged or {}).items():
                StoreWriter(kvstore, schema, lock).unmark(split, shards)
            filler = _StoreFiller(job, kvstore, lock)
            written += filler.fill(schema, started)
            if added := set(wanted.layers).difference(schema.layers):
                written += filler.add_layers(schema, sorted(added))
    else:
        kvstore.require_all_regular()  # as `hold` does
        remove_dead(kvstore)
    return written.result(job.store.path, time.perf_counter() - started)


def _is_complete(kvstore: KeyValueStore, wanted: Schema) -> bool:
    stored = open_schema(kvstore)
    if stored is None or kvstore.read_group(NEXT) is not None or not holds_samples(kvstore, stored):
        return False
    if not holds_all_samples(stored, wanted, kvstore.place) or not set(wanted.layers) <= set(stored.layers):
        return False
    return not any(StoreWriter(kvstore, stored).missing_shards(split) for split in stored.splits)


@dataclass(frozen=True)
class _Written:
    """Counts that are added up over the steps of a job."""

    shards: int = 0
    samples: int = 0
    retries: int = 0

    def __add__(self, other: "_Written") -> "_Written":
        return _Written(self.shards + other.shards, self.samples + other.samples, self.retries + other.retries)

    def result(self, path: str, seconds: float) -> Extraction:
        return Extraction(
            store=open_store(path),
            path=path,
            shards_written=self.shards,
            samples_written=self.samples,
            seconds=seconds,
            retries=self.retries,
        )


@dataclass(frozen=True)
class _StoreFiller:
    """Extracts missing shards to a locked store; `job.source` is in the order of the store."""

    job: ExtractionJob
    kvstore: KeyValueStore
    lock: Lock

    def fill(self, schema: Schema, started: float, marks: MarkPlace = MarkPlace.STORE) -> _Written:
        """Extract and commit the missing shards of a store, or of layers that are being added."""
        writer = StoreWriter(self.kvstore, schema, self.lock, marks)
        missing = {split: writer.missing_shards(split) for split in schema.splits}
        n_shards = sum(map(len, missing.values()))
        if not n_shards:
            return _Written()
        if marks is MarkPlace.STORE:
            require_space(self.kvstore, schema, missing)
        if self.job.workers.are_needed:
            from extract.job.cluster_extraction import extract_on_cluster  # importing dask takes half a second
            from extract.job.cluster_worker import ExtractionPlugin

            self.job.backbone.module.to("cpu")  # so that it can be pickled, and workers here have the GPU to themselves
            plugin = ExtractionPlugin(self.job, schema, self.lock.id, marks)
            return _Written(n_shards, *extract_on_cluster(plugin, missing, writer, started))
        extractor = ShardExtractor(self.job, schema, read_rms(self.kvstore, schema))
        return _Written(n_shards, _run_here(extractor, missing, writer, started))

    def add_layers(self, schema: Schema, layers: Sequence[int]) -> _Written:
        """Extract layers that a complete store does not have, and make them part of it."""
        started = time.perf_counter()
        added = open_layers(self.kvstore, self.job, stored=schema, layers=tuple(layers), lock=self.lock)
        written = self.fill(added, started, MarkPlace.ADDED_LAYERS)
        finish_layers(self.kvstore, schema, added, self.lock)
        return written


def _run_here(extractor: ShardExtractor, missing: ShardsBySplit, writer: StoreWriter, started: float) -> int:
    """Extract and commit shards in this process; a shard is written while the next one is computed.

    Returns the number of samples written.
    """
    written, lap = 0, started
    with thread_pool(1, "commit") as pool:
        commit: Future[None] | None = None
        for split, shards in missing.items():
            total = sum(len(extractor.schema.shards(split).rows(shard)) for shard in shards)
            with progress(f"extracting {split}", total, "samples") as advance:
                for number, shard in zip(shards, extractor.extract(split, shards, advance), strict=True):
                    if commit:
                        commit.result()
                    now = time.perf_counter()
                    commit = pool.submit(_commit, writer, split, number, shard, now - lap)
                    lap, written = now, written + int((shard.status == STORED).sum())
        if commit:
            commit.result()
    return written


def _commit(writer: StoreWriter, split: str, number: int, shard: ExtractedShard, seconds: float) -> None:
    writer.write(split, number, shard.tokens, shard.status)
    writer.log_and_mark(
        split,
        number,
        shard.status,
        seconds=seconds,
        forward_seconds=shard.forward_seconds,
        skipped=shard.skipped,
    )
