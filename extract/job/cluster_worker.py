"""Runs in dask workers: loads the frozen backbone once, then extracts whole shards and makes their values durable.

A worker never marks a shard; only the job that holds the store's lock does. Before each write it checks that its job
still holds the lock, so a worker that outlives its job, or hangs for a while, does not touch the store.
"""

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8

from extract.backbones.backbone import digests
from extract.job.extraction_job import ExtractionJob
from extract.job.shard_extractor import ShardExtractor
from extract.job.task_plugin import TaskPlugin
from extract.sources.videos import decoder_info
from store.address import store_url
from store.array_io import read_array
from store.arrays import SAMPLE_DIGEST, MarkPlace, read_rms
from store.compare import differences
from store.errors import JobError
from store.kvstore import KeyValueStore
from store.lock import Watch
from store.schema import Schema
from store.writer import StoreWriter

Shard = tuple[str, int]  # split, number


class ExtractionPlugin(TaskPlugin):
    """Extracts the shards of a job on a worker.

    Args:
        job: its source is in the order of the store; all workers must be able to read its files.
        schema: of the store, or of layers that are added to it.
        lock_id: of the lock by which the job holds the store.
        marks: where commit marks and digests go: those of the store, or of layers being added (`store.growing`).
    """

    def __init__(self, job: ExtractionJob, schema: Schema, lock_id: str, marks: MarkPlace) -> None:
        super().__init__(f"sidecache-{lock_id}", job.workers)
        self.job, self.schema, self.lock_id, self.marks = job, schema, lock_id, marks

    def compute(self, task: Shard) -> dict[str, Any]:
        """Compute and write one shard; returns its status, skipped samples and forward time.

        Raises:
            UserError, JobError: as of `ShardExtractor.extract` and `StoreWriter.write`; or the files, weights or
                precision of this worker differ from the job's.
        """
        return self._loaded.extract(*task)

    @cached_property
    def _loaded(self) -> "_LoadedJob":
        """Loaded by the first task rather than in `setup`, which would block the worker's heartbeats."""
        return _LoadedJob(self, self.device(self.job.extract.device))


class _LoadedJob:
    """A job on this worker, with its backbone loaded and verified."""

    def __init__(self, plugin: ExtractionPlugin, device: str) -> None:
        schema = plugin.schema
        # open the store
        kvstore = KeyValueStore(store_url(plugin.job.store.path))
        kvstore.stay_on_disk()
        self._kvstore, self._schema = kvstore, schema
        self._writer = StoreWriter(kvstore, schema, Watch(kvstore, plugin.lock_id), plugin.marks)
        # load the backbone, and compare it with the job's
        job = plugin.job.on_worker(device)
        self._splits = job.source.splits
        self._extractor = ShardExtractor(job, schema, read_rms(kvstore, schema))
        _require_same(
            schema, {**digests(job.backbone), "precision": self._extractor.precision, **_decoder_digest(schema)}
        )
        self._sample_digests: dict[str, UInt8[np.ndarray, "samples 16"]] = {}

    def extract(self, split: str, number: int) -> dict[str, Any]:
        """Write one shard; returns its status, skipped samples and forward time."""
        self._check_samples(split, number)
        [shard] = self._extractor.extract(split, [number])
        self._writer.write(split, number, shard.tokens, shard.status)
        return {"status": shard.status.tolist(), "skipped": shard.skipped, "forward_seconds": shard.forward_seconds}

    def _check_samples(self, split: str, number: int) -> None:
        """Compare the samples of a shard with those that the job listed: this machine may have other files."""
        if split not in self._sample_digests:
            self._sample_digests[split] = read_array(self._kvstore, f"{split}/{SAMPLE_DIGEST}")
        samples, listed = self._splits[split], self._sample_digests[split]
        for row in self._schema.shards(split).rows(number):
            if samples.digest(row) != listed[row].tobytes():
                raise JobError(
                    f"sample {samples.ids[row]!r} of {split} differs on this worker from the one that the job listed; "
                    "all workers must see the same files"
                )


def _require_same(schema: Schema, found: dict[str, str]) -> None:
    pairs = {name: (getattr(schema.provenance, name), value) for name, value in found.items()}
    for name, (wanted, value) in differences(pairs).items():
        raise JobError(
            f"this worker's {name} is {value}, the job's is {wanted}; all workers must have the same weights, "
            "libraries and kind of device (or set extract.device and extract.precision)"
        )


def _decoder_digest(schema: Schema) -> dict[str, str]:
    return {"decoder_digest": decoder_info().digest} if schema.provenance.decoder_digest else {}
