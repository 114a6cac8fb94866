"""Extraction by many processes, on dask.distributed.

The job hands out shards, and alone marks and logs what workers report as durable. A worker that dies, hangs or is lost
costs the shard that it was at: another one begins it anew, at most `RETRIES` times. Since a shard depends on its own
samples alone, the store does not tell how many workers made it, or in which order.
"""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from distributed import Client, KilledWorker, wait

from extract.config import ExtractConfig
from extract.job.cluster_worker import Extractor, Work, extract_on_worker
from extract.job.local_cluster import local_cluster
from store.arrays import STORED
from store.console.progress import progress
from store.errors import JobError, Note, UserError
from store.schema import Schema
from store.writer import StoreWriter

RETRIES = 3  # of a shard, whatever ended it
_IN_FLIGHT = 256  # shards handed out at a time
_LOOK_SECONDS = 0.5
_CONNECT_SECONDS, _RESTART_SECONDS, _START_SECONDS = 30, 60, 600
_SLOWEST_FACTOR, _AT_LEAST_SECONDS, _AT_FIRST_SECONDS = 10, 600.0, 3600.0

Shard = tuple[str, int]


def run_on_cluster(
    work: Work, missing: Mapping[str, Sequence[int]], writer: StoreWriter, started: float
) -> tuple[int, int]:
    """Extract and commit all missing shards with `extract.workers` processes, or on `extract.scheduler`.

    Returns:
        samples written, and how many shards were begun again.

    Raises:
        UserError: there is no such scheduler; a sample cannot be decoded.
        JobError: a shard failed too often, or the disk refuses; what is committed is kept.
    """
    todo = [(split, shard) for split, shards in missing.items() for shard in shards]
    with _connect(work.config) as client, _hand_out(client, work) as name:
        return _Job(client, name, work.schema, writer, work.config).run(todo, started)


@contextmanager
def _connect(config: ExtractConfig) -> Iterator[Client]:
    """A cluster of this machine's, for this job alone, or a client of the one that there is."""
    if config.scheduler:
        try:
            client = Client(config.scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no dask scheduler answers at extract.scheduler {config.scheduler!r} ({error}); start one with "
                "`dask scheduler`, or set extract.workers alone"
            ) from error
        with client:
            _note_if_open(config.scheduler)
            client.wait_for_workers(config.workers)
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": RETRIES,
        # Dask gives up for good on a worker that takes 15 s to start again, and with the last one the job would wait
        # for ever; torch alone may take longer to load.
        "distributed.deploy.lost-worker-timeout": f"{_START_SECONDS} s",
        "distributed.scheduler.no-workers-timeout": f"{_START_SECONDS} s",
    }
    with local_cluster(config.workers, settings) as client:
        yield client


def _note_if_open(address: str) -> None:
    if not address.startswith(("tls://", "wss://")):
        warnings.warn(
            f"the scheduler {address} asks for no certificate: whoever reaches it or its workers runs code there in "
            "your name; on a network that others use, start it with TLS (docs/clusters.md)",
            Note,
            stacklevel=2,
        )


@contextmanager
def _hand_out(client: Client, work: Work) -> Iterator[str]:
    """Give all workers, those to come included, what they need; yields the name of the plugin that has it."""
    name = f"sidecache-{work.owner}"
    threads = None if work.config.scheduler else max(1, (os.cpu_count() or 1) // work.config.workers)
    backbone = None if work.recipe else work.backbone
    try:
        client.register_plugin(Extractor(name, replace(work, backbone=backbone, threads=threads)))
    except TypeError as error:
        raise UserError(
            f"the samples or the backbone cannot be sent to other processes ({error}); define their classes at the top "
            "of a module, or leave extract.workers at 1"
        ) from error
    try:
        yield name
    finally:
        client.unregister_worker_plugin(name)


class _Job:
    """Shards under way, and what has happened to them."""

    def __init__(self, client: Client, name: str, schema: Schema, writer: StoreWriter, config: ExtractConfig) -> None:
        self._client, self._name, self._schema, self._writer, self._config = client, name, schema, writer, config
        self._pending: dict[Any, Shard] = {}
        self._begun: Counter[Shard] = Counter()
        self._at_work: dict[Shard, tuple[str, float]] = {}  # the worker, and since when
        self._written: dict[Shard, dict[str, Any]] = {}
        self._slowest, self._mutex = 0.0, Lock()  # dask calls `_note` from a thread of its own

    def run(self, todo: Sequence[Shard], started: float) -> tuple[int, int]:
        self._client.subscribe_topic(self._name, self._note)
        written, lap, waiting = 0, started, iter(todo)
        with progress("extracting", sum(map(self._rows, todo)), "samples") as advance:
            try:
                for shard, done in self._results(waiting):
                    now = time.perf_counter()
                    status = np.array(done["status"], np.uint8)
                    self._writer.log_and_mark(*shard, status, now - lap, done["forward_seconds"], done["skipped"])
                    lap, written = now, written + int((status == STORED).sum())
                    advance(self._rows(shard))
            finally:
                self._client.cancel(list(self._pending))
                self._client.unsubscribe_topic(self._name)
        return written, self._begun.total() - len(self._begun)

    def _rows(self, shard: Shard) -> int:
        return len(self._schema.shards(shard[0]).rows(shard[1]))

    def _results(self, waiting: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        self._submit(waiting, _IN_FLIGHT)
        while self._pending:
            for future in self._finished():
                shard = self._pending.pop(future)
                if future.status == "finished":
                    yield shard, self._written.pop(shard)  # events overtake no result
                    self._submit(waiting, 1)
                else:
                    self._try_again(shard, future)
            self._look_for_lost()

    def _finished(self) -> list[Any]:
        try:
            return list(wait(list(self._pending), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def _submit(self, waiting: Iterator[Shard], most: int) -> None:
        for _, shard in zip(range(most), waiting, strict=False):
            future = self._client.submit(extract_on_worker, self._name, *shard, pure=False)
            self._pending[future] = shard

    def _try_again(self, shard: Shard, future: Any) -> None:
        error = future.exception()
        with self._mutex:
            self._at_work.pop(shard, None)
        if isinstance(error, UserError):
            raise error
        if not isinstance(error, JobError | KilledWorker):
            raise JobError(f"{_place(shard)} failed: {_reason(error)}")
        if self._begun[shard] > RETRIES:
            raise error if isinstance(error, JobError) else self._hopeless(shard)
        self._submit(iter([shard]), 1)  # of the deaths of a worker dask also blames shards that only waited there

    def _note(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        shard, now = (message["split"], message["shard"]), time.monotonic()
        with self._mutex:
            if "written" in message:
                self._written[shard] = message["written"]
                _, since = self._at_work.pop(shard, ("", now))
                self._slowest = max(self._slowest, now - since)
            else:
                self._begun[shard] += 1
                self._at_work[shard] = (message["worker"], now)

    def _look_for_lost(self) -> None:
        """End workers that stand still, and the job where a shard has ended too many of them."""
        limit, now = self._limit(), time.monotonic()
        with self._mutex:
            hopeless = [shard for shard, (_, _) in self._at_work.items() if self._begun[shard] > 1 + RETRIES]
            still = {worker for worker, since in self._at_work.values() if now - since > limit}
            self._at_work = {shard: at for shard, at in self._at_work.items() if at[0] not in still}
        if hopeless:
            raise self._hopeless(hopeless[0])
        if still:
            self._client.restart_workers(sorted(still), timeout=_RESTART_SECONDS, raise_for_error=False)

    def _hopeless(self, shard: Shard) -> JobError:
        return JobError(
            f"{_place(shard)} was begun {1 + RETRIES} times, and each time its worker died or stood still for "
            f"{self._limit():,.0f} s; look at its samples, the workers' memory, and extract.shard_seconds"
        )

    def _limit(self) -> float:
        """Seconds that a worker may take for a shard."""
        if self._config.shard_seconds != "auto":
            return self._config.shard_seconds
        return max(_AT_LEAST_SECONDS, _SLOWEST_FACTOR * self._slowest) if self._slowest else _AT_FIRST_SECONDS


def _place(shard: Shard) -> str:
    return f"shard {shard[1]} of {shard[0]}"


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
