"""Extracts shards in many processes, with dask.distributed.

The job hands out shards; it alone marks and logs those that workers report as durable. If a worker dies, hangs or is
lost, its current shard is extracted again by another one, at most `RETRIES` times. A shard depends on its own samples
only, so the store is identical for any number of workers and any order of shards.
"""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
from distributed import Client, KilledWorker, wait

from extract.config import ExtractConfig
from extract.job.cluster_worker import ExtractionPlugin, extract_on_worker
from extract.job.local_cluster import local_cluster
from store.arrays import STORED
from store.console.progress import progress
from store.errors import JobError, Note, UserError
from store.writer import StoreWriter

RETRIES = 3  # of a shard, for any cause
_IN_FLIGHT = 256  # shards submitted at a time
_POLL_SECONDS = 0.5
_CONNECT_SECONDS, _RESTART_SECONDS, _START_SECONDS = 30, 60, 600
# seconds that a shard may take by default: a multiple of the slowest so far, a minimum, and for the first shard
_SLOWEST_FACTOR, _MIN_SECONDS, _FIRST_SECONDS = 10, 600.0, 3600.0

Shard = tuple[str, int]  # split, number


def run_on_cluster(
    plugin: ExtractionPlugin, missing: Mapping[str, Sequence[int]], writer: StoreWriter, started: float
) -> tuple[int, int]:
    """Extract and commit all missing shards with `extract.workers` processes, or on `extract.scheduler`.

    Returns:
        the number of samples written, and how many times a shard was started again.

    Raises:
        UserError: the scheduler does not answer; a sample cannot be decoded.
        JobError: a shard failed too often, or the disk refuses; committed shards are kept.
    """
    shards = [(split, number) for split, numbers in missing.items() for number in numbers]
    with _connect(plugin.job.extract) as client, _registered(client, plugin):
        return _ShardDispatcher(client, plugin, writer).run(shards, started)


@contextmanager
def _connect(config: ExtractConfig) -> Iterator[Client]:
    """A client of `extract.scheduler`, or of a local cluster that is started for this job alone."""
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
        # By default dask gives up on a worker that takes 15 s to restart, and a job without workers would hang; loading
        # torch alone may take longer.
        "distributed.deploy.lost-worker-timeout": f"{_START_SECONDS} s",
        "distributed.scheduler.no-workers-timeout": f"{_START_SECONDS} s",
    }
    with local_cluster(config.workers, settings) as client:
        yield client


def _note_if_open(address: str) -> None:
    if not address.startswith(("tls://", "wss://")):
        warnings.warn(
            f"the scheduler {address} asks for no certificate: anyone who can reach it or its workers can run code "
            "there in your name; on a network that others use, start it with TLS (docs/clusters.md)",
            Note,
            stacklevel=2,
        )


@contextmanager
def _registered(client: Client, plugin: ExtractionPlugin) -> Iterator[None]:
    """Send the job to all workers, also to those that join later, until the block ends."""
    try:
        client.register_plugin(plugin)
    except TypeError as error:
        raise UserError(
            f"the samples or the backbone cannot be sent to other processes ({error}); define their classes at the top "
            "of a module, or leave extract.workers at 1"
        ) from error
    try:
        yield
    finally:
        client.unregister_worker_plugin(plugin.name)


class _ShardDispatcher:
    """Submits shards, commits those that are written, and retries those that fail."""

    def __init__(self, client: Client, plugin: ExtractionPlugin, writer: StoreWriter) -> None:
        self._client, self._topic, self._writer = client, plugin.name, writer
        self._schema, self._config = plugin.schema, plugin.job.extract
        self._submitted: dict[Any, Shard] = {}  # by dask future
        self._starts: Counter[Shard] = Counter()
        self._running: dict[Shard, tuple[str, float]] = {}  # worker, time of start
        self._written: dict[Shard, dict[str, Any]] = {}
        self._slowest, self._mutex = 0.0, Lock()  # dask calls `_on_event` in another thread

    def run(self, shards: Sequence[Shard], started: float) -> tuple[int, int]:
        """Extract all shards; returns samples written and retries."""
        self._client.subscribe_topic(self._topic, self._on_event)
        n_samples, lap, waiting = 0, started, iter(shards)
        with progress("extracting", sum(map(self._n_rows, shards)), "samples") as advance:
            try:
                for shard, written in self._results(waiting):
                    now = time.perf_counter()
                    status = np.array(written["status"], np.uint8)
                    self._writer.log_and_mark(
                        *shard,
                        status,
                        seconds=now - lap,
                        forward_seconds=written["forward_seconds"],
                        skipped=written["skipped"],
                    )
                    lap, n_samples = now, n_samples + int((status == STORED).sum())
                    advance(self._n_rows(shard))
            finally:
                self._client.cancel(list(self._submitted))
                self._client.unsubscribe_topic(self._topic)
        return n_samples, self._starts.total() - len(self._starts)

    def _n_rows(self, shard: Shard) -> int:
        split, number = shard
        return len(self._schema.shards(split).rows(number))

    def _results(self, waiting: Iterator[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
        """Shards as they are written, with what the worker reported of each."""
        self._submit(waiting, _IN_FLIGHT)
        while self._submitted:
            for future in self._finished():
                shard = self._submitted.pop(future)
                if future.status == "finished":
                    yield shard, self._written.pop(shard)  # its event arrives before its result
                    self._submit(waiting, 1)
                else:
                    self._retry(shard, future)
            self._restart_hung_workers()

    def _finished(self) -> list[Any]:
        try:
            return list(wait(list(self._submitted), timeout=_POLL_SECONDS, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def _submit(self, waiting: Iterator[Shard], at_most: int) -> None:
        for _, shard in zip(range(at_most), waiting, strict=False):
            future = self._client.submit(extract_on_worker, self._topic, *shard, pure=False)
            self._submitted[future] = shard

    def _retry(self, shard: Shard, future: Any) -> None:
        """Submit a failed shard again, or raise if its error is final or it has been retried too often."""
        error = future.exception()
        with self._mutex:
            self._running.pop(shard, None)
        if isinstance(error, UserError):
            raise error
        if not isinstance(error, JobError | KilledWorker):
            raise JobError(f"{_name(shard)} failed: {type(error).__name__}: {error}")
        # counted by starts: dask also blames a worker's death on shards that were only queued there
        if self._starts[shard] > RETRIES:
            raise error if isinstance(error, JobError) else self._too_many_starts(shard)
        self._submit(iter([shard]), 1)

    def _on_event(self, event: tuple[float, dict[str, Any]]) -> None:
        """Record that a worker started or wrote a shard; see `ExtractionPlugin.extract`."""
        message = event[1]
        shard, now = (message["split"], message["shard"]), time.monotonic()
        with self._mutex:
            if "written" in message:
                self._written[shard] = message["written"]
                _, since = self._running.pop(shard, ("", now))
                self._slowest = max(self._slowest, now - since)
            else:
                self._starts[shard] += 1
                self._running[shard] = (message["worker"], now)

    def _restart_hung_workers(self) -> None:
        """Restart workers that exceed the time limit; end the job if a shard has ended too many of them."""
        limit, now = self._limit(), time.monotonic()
        with self._mutex:
            given_up = [shard for shard in self._running if self._starts[shard] > 1 + RETRIES]
            hung = {worker for worker, since in self._running.values() if now - since > limit}
            self._running = {shard: run for shard, run in self._running.items() if run[0] not in hung}
        if given_up:
            raise self._too_many_starts(given_up[0])
        if hung:
            self._client.restart_workers(sorted(hung), timeout=_RESTART_SECONDS, raise_for_error=False)

    def _too_many_starts(self, shard: Shard) -> JobError:
        return JobError(
            f"{_name(shard)} was started {1 + RETRIES} times, and each time its worker died or made no progress for "
            f"{self._limit():,.0f} s; check its samples, the workers' memory, and extract.shard_seconds"
        )

    def _limit(self) -> float:
        """Seconds that a worker may take for a shard."""
        if self._config.shard_seconds != "auto":
            return self._config.shard_seconds
        return max(_MIN_SECONDS, _SLOWEST_FACTOR * self._slowest) if self._slowest else _FIRST_SECONDS


def _name(shard: Shard) -> str:
    return f"shard {shard[1]} of {shard[0]}"
