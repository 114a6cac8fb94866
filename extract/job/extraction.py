"""The extraction job: find what is missing, run the frozen backbone over it, commit shard after shard."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from extract.backbones.backbone import Backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.forward.frozen_forward import FrozenForward
from extract.forward.threads import thread_pool
from extract.job.open_store import open_layers, open_or_create, require_space
from extract.job.shard import ExtractedShard, ShardExtractor
from extract.job.wanted_schema import list_split, wanted_schema
from extract.sources.open_source import ImageSource
from extract.sources.store_order import in_store_order
from store.address import store_url
from store.arrays import NEXT, STORED, MarkPlace, holds_samples, open_schema, read_rms, refuse_foreign_files
from store.compare import holds_all_samples
from store.config import StoreConfig
from store.console.progress import progress
from store.growing.added_layers import finish_layers
from store.growing.growth import read_known
from store.kvstore import KeyValueStore
from store.layout import resolve_layers
from store.lock import Lock, hold, remove_dead
from store.reader import Store, open_store
from store.schema import Schema
from store.writer import StoreWriter

Missing = Mapping[str, Sequence[int]]  # split -> shards


@dataclass(frozen=True)
class Extraction:
    """What one run of the job did.

    Attributes:
        path: where the store is, as given.
        samples_written: counted again for layers that are added.
        retries: how many shards were begun again, because a worker was lost or failed.
    """

    store: Store
    path: str
    shards_written: int
    samples_written: int
    seconds: float
    retries: int = 0


def extract_tokens(
    source: ImageSource,
    backbone: Backbone,
    data: DataConfig,
    store: StoreConfig,
    config: ExtractConfig,
    recipe: BackboneConfig | None = None,
    again: Missing | None = None,
) -> Extraction:
    """Bring a store to completion: only its missing shards are extracted, none where it is whole.

    Samples and layers that it does not know are added to it (docs/growing.md).

    Args:
        recipe: what the backbone was loaded from, for workers to load it too; without it they are sent the backbone.
        again: shards that are damaged; they count as missing once it is clear that this job can extract them.

    Raises:
        ChangedError: samples that the store holds are gone or changed.
        UserError: the store there was made from something else; a sample cannot be decoded (`on_error: fail`).
        JobError: a value cannot be stored, the disk refuses or is too small, another job is at work on the store.
    """
    started = time.perf_counter()
    folder = KeyValueStore(store_url(store.path))
    refuse_foreign_files(folder)
    known = read_known(folder)
    source = in_store_order(source, known.ids if known else {})
    listings = {name: list_split(name, split) for name, split in source.splits.items()}
    forward = FrozenForward(backbone, resolve_layers(store.layers, backbone.depth), store.tokens, config)
    wanted = wanted_schema(source, forward, listings, store)
    done = _Done()
    if again or not _is_complete(folder, wanted):
        with hold(folder) as lock:
            schema = open_or_create(folder, wanted, source, forward, listings, data, lock, known)
            for split, shards in (again or {}).items():
                StoreWriter(folder, schema, lock).unmark(split, shards)
            job = _Job(folder, source, backbone, data, store, config, recipe, lock)
            done += job.fill(schema, started)
            if lacking := set(wanted.layers).difference(schema.layers):
                done += job.add_layers(schema, sorted(lacking))
    else:
        folder.require_all_regular()  # as `hold` does
        remove_dead(folder)
    seconds = time.perf_counter() - started
    return Extraction(open_store(store.path), store.path, done.shards, done.samples, seconds, done.retries)


def _is_complete(folder: KeyValueStore, wanted: Schema) -> bool:
    stored = open_schema(folder)
    if stored is None or folder.read_group(NEXT) is not None or not holds_samples(folder, stored):
        return False
    if not holds_all_samples(stored, wanted, folder.place) or not set(wanted.layers) <= set(stored.layers):
        return False
    return not any(StoreWriter(folder, stored).missing_shards(split) for split in stored.splits)


@dataclass(frozen=True)
class _Done:
    shards: int = 0
    samples: int = 0
    retries: int = 0

    def __add__(self, other: "_Done") -> "_Done":
        return _Done(self.shards + other.shards, self.samples + other.samples, self.retries + other.retries)


@dataclass(frozen=True)
class _Job:
    """What does not change while a store is filled; `source` is in the order of the store."""

    folder: KeyValueStore
    source: ImageSource
    backbone: Backbone
    data: DataConfig
    store: StoreConfig
    config: ExtractConfig
    recipe: BackboneConfig | None
    lock: Lock

    def fill(self, schema: Schema, started: float, marks: MarkPlace = MarkPlace.STORE) -> _Done:
        """Extract and commit the missing shards of a store, or of the layers whose marks are at `marks`."""
        writer = StoreWriter(self.folder, schema, self.lock, marks)
        missing = {split: writer.missing_shards(split) for split in schema.splits}
        n_shards = sum(map(len, missing.values()))
        if not n_shards:
            return _Done()
        if marks is MarkPlace.STORE:
            require_space(self.folder, schema, missing)
        if self.config.workers > 1 or self.config.scheduler:
            return _Done(n_shards, *self._on_cluster(schema, missing, writer, started, marks))
        forward = FrozenForward(self.backbone, schema.layers, self.store.tokens, self.config)
        rms, skip = read_rms(self.folder, schema), self.data.on_error == "skip"
        extractor = ShardExtractor(self.source.splits, forward, schema, rms, skip)
        return _Done(n_shards, _run_here(extractor, missing, writer, schema, started))

    def add_layers(self, schema: Schema, layers: Sequence[int]) -> _Done:
        """Extract layers that a complete store lacks, and make them part of it."""
        started = time.perf_counter()
        forward = FrozenForward(self.backbone, layers, self.store.tokens, self.config)
        added = open_layers(self.folder, schema, self.source.splits["train"], forward, self.data, self.lock)
        done = self.fill(added, started, MarkPlace.ADDED_LAYERS)
        finish_layers(self.folder, schema, added, self.lock)
        return done

    def _on_cluster(
        self, schema: Schema, missing: Missing, writer: StoreWriter, started: float, marks: MarkPlace
    ) -> tuple[int, int]:
        from extract.job.cluster import run_on_cluster  # half a second that other jobs need not wait
        from extract.job.cluster_worker import Work

        splits, tokens, clips = dict(self.source.splits), self.store.tokens, self.data.clips
        skip, owner, path = self.data.on_error == "skip", self.lock.id, self.store.path
        self.backbone.module.to("cpu")  # so that it can travel, and workers here have the GPU to themselves
        work = Work(path, schema, splits, skip, owner, self.config, tokens, self.recipe, clips, self.backbone, marks)
        return run_on_cluster(work, missing, writer, started)


def _run_here(extractor: ShardExtractor, missing: Missing, writer: StoreWriter, schema: Schema, started: float) -> int:
    """Extract and commit all missing shards in this process; a shard is written while the next one is computed.

    Returns the number of samples written.
    """
    written, lap = 0, started
    with thread_pool(1, "commit") as pool:
        commit: Future[None] | None = None
        for split, shards in missing.items():
            total = sum(len(schema.shards(split).rows(shard)) for shard in shards)
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
    writer.log_and_mark(split, number, shard.status, seconds, shard.forward_seconds, shard.skipped)
