"""Runs in dask workers: loads the frozen backbone once, then extracts whole shards and makes their values durable.

A worker never marks a shard; only the job that holds the store's lock does. Before each write it checks that its job
still holds the lock, so a worker that outlives its job, or hangs for a while, does not touch the store.
"""

import os
import re
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from distributed import Worker, WorkerPlugin, get_worker
from distributed.utils import sync
from jaxtyping import UInt8

from extract.backbones.backbone import digests
from extract.forward.device import configure_process
from extract.job.extraction_job import ExtractionJob
from extract.job.shard_extractor import ShardExtractor
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


class ExtractionPlugin(WorkerPlugin):
    """Carries a job to every worker of the cluster, also to workers that join later.

    Args:
        job: its source is in the order of the store; all workers must be able to read its files.
        schema: of the store, or of layers that are added to it.
        lock_id: of the lock by which the job holds the store.
        marks: where commit marks and digests go: those of the store, or of layers being added (`store.growing`).
    """

    def __init__(self, job: ExtractionJob, schema: Schema, lock_id: str, marks: MarkPlace) -> None:
        self.name = f"sidecache-{lock_id}"
        self.job, self.schema, self.lock_id, self.marks = job, schema, lock_id, marks

    def setup(self, worker: Worker) -> None:
        """See `WorkerPlugin`."""
        self._worker, self._mutex = worker, Lock()

    def extract(self, split: str, number: int) -> None:
        """Compute and write one shard; the threads of a worker take turns.

        Start and end are sent to the job as events: the result of a dask task would stay on the worker, and be lost
        with it.

        Raises:
            UserError, JobError: as of `ShardExtractor.extract` and `StoreWriter.write`; or the files, weights or
                precision of this worker differ from the job's.
        """
        event = {"split": split, "shard": number, "worker": self._worker.address}
        with self._mutex:
            self._send(event)
            self._send(event | {"written": self._loaded.extract(split, number)})

    def _send(self, event: dict[str, Any]) -> None:
        """Return once the scheduler has received it; `Worker.log_event` buffers, and a worker's death loses that."""
        sync(self._worker.loop, self._worker.scheduler.log_event, topic=self.name, msg=event)

    @cached_property
    def _loaded(self) -> "_LoadedJob":
        """Loaded by the first task rather than in `setup`, which would block the worker's heartbeats."""
        return _LoadedJob(self, self._worker.name)


def extract_on_worker(name: str, split: str, number: int) -> None:
    """The dask task of one shard; `name` is that of the job's plugin."""
    configure_process()
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, ExtractionPlugin)
    plugin.extract(split, number)


class _LoadedJob:
    """A job on this worker, with its backbone loaded and verified."""

    def __init__(self, plugin: ExtractionPlugin, worker_name: Any) -> None:
        schema, settings = plugin.schema, plugin.job.extract
        if not settings.scheduler:  # the workers of this machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
        # open the store
        kvstore = KeyValueStore(store_url(plugin.job.store.path))
        kvstore.stay_on_disk()
        self._kvstore, self._schema = kvstore, schema
        self._writer = StoreWriter(kvstore, schema, Watch(kvstore, plugin.lock_id), plugin.marks)
        # load the backbone, and compare it with the job's
        job = plugin.job.on_worker(_device(settings.device, worker_name))
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


def _device(device: str, worker_name: Any) -> str:
    """One GPU for each worker that sees several, by the number in its name: 3, NAME-3; an address has none."""
    n_gpus, number = torch.cuda.device_count(), re.fullmatch(r"(?:.*-)?(\d+)", str(worker_name))
    if device not in ("auto", "cuda") or n_gpus < 2 or not number:
        return device
    return f"cuda:{int(number[1]) % n_gpus}"
