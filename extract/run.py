"""The extraction job: find what is missing, run the frozen backbone over it, commit shard after shard."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from extract.backbone import Backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.describe import list_split, wanted_schema
from extract.forward import FrozenForward
from extract.opening import open_or_create, require_space
from extract.shard import ExtractedShard, ShardExtractor
from extract.sources import ImageSource
from extract.threads import thread_pool
from store.arrays import STORED, holds_samples, open_schema, read_rms
from store.backend import Folder, store_url
from store.config import StoreConfig
from store.layout import resolve_layers
from store.lock import hold
from store.progress import progress
from store.reader import Store, open_store
from store.schema import Schema, require_same
from store.writer import StoreWriter

Missing = Mapping[str, Sequence[int]]  # split -> shards


@dataclass(frozen=True)
class Extraction:
    """What one run of the job did. `retries`: how many shards were begun again, because a worker was lost or failed."""

    store: Store
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
) -> Extraction:
    """Bring a store to completion: only its missing shards are extracted, none where it is whole.

    Args:
        recipe: what the backbone was loaded from, for workers to load it too; without it they are sent the backbone.

    Raises:
        UserError: the store there was made from something else; a sample cannot be decoded (`on_error: fail`).
        JobError: a value cannot be stored, the disk refuses or is too small, another job is at work on the store.
    """
    started = time.perf_counter()
    forward = FrozenForward(backbone, resolve_layers(store.layers, backbone.depth), store.tokens, config)
    listings = {name: list_split(name, split) for name, split in source.splits.items()}
    folder = Folder(store_url(store.path))
    wanted = wanted_schema(source, forward, listings, store)
    n_shards = n_samples = retries = 0
    if not _is_complete(folder, wanted):  # which a store on a read-only disk may be
        with hold(folder) as lock:
            schema = open_or_create(folder, wanted, source, forward, listings, data)
            writer = StoreWriter(folder, schema, lock)
            missing = {split: writer.missing_shards(split) for split in schema.splits}
            require_space(folder, schema, missing)
            n_shards, skip = sum(map(len, missing.values())), data.on_error == "skip"
            if config.workers > 1 or config.scheduler:
                from extract.cluster import run_on_cluster  # half a second that other jobs need not wait
                from extract.worker import Work

                splits, tokens, clips = dict(source.splits), store.tokens, data.clips
                work = Work(store.path, schema, splits, skip, lock.id, config, tokens, recipe, clips, backbone)
                n_samples, retries = run_on_cluster(work, missing, writer, started)
            else:
                extractor = ShardExtractor(source.splits, forward, schema, read_rms(folder, schema), skip)
                n_samples = _run_here(extractor, missing, writer, schema, started)
    return Extraction(open_store(store.path), n_shards, n_samples, time.perf_counter() - started, retries)


def _is_complete(folder: Folder, wanted: Schema) -> bool:
    stored = open_schema(folder)
    if stored is None or not holds_samples(folder, stored):
        return False
    require_same(stored, wanted, folder.place)
    return not any(StoreWriter(folder, stored).missing_shards(split) for split in stored.splits)


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
                for number in shards:
                    shard = extractor.extract(split, number, advance)
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
