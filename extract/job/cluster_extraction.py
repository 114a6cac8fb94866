"""Extracts shards in many processes, with dask.distributed.

The job hands out shards; it alone marks and logs those that workers report as durable. A shard depends on its own
samples only, so the store is identical for any number of workers and any order of shards.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import Any

import numpy as np

from extract.config import ExtractConfig
from extract.job.cluster import connect
from extract.job.cluster_worker import ExtractionPlugin, Shard
from extract.job.dispatch import Dispatcher, open_dispatcher
from extract.job.retry_rules import RetryRules
from store.arrays import STORED
from store.console.progress import progress
from store.writer import StoreWriter

_IN_FLIGHT = 256  # shards submitted at a time


def extract_on_cluster(
    plugin: ExtractionPlugin, missing: Mapping[str, Sequence[int]], writer: StoreWriter, started: float
) -> tuple[int, int]:
    """Extract and commit all missing shards with `extract.workers` processes, or on `extract.scheduler`.

    Returns:
        the number of samples written, and how many times a shard was started again.

    Raises:
        UserError: the scheduler does not answer; a sample cannot be decoded.
        JobError: a shard failed too often, or the disk refuses; committed shards are kept.
    """
    n_rows = {
        (split, number): len(plugin.schema.shards(split).rows(number))
        for split, numbers in missing.items()
        for number in numbers
    }
    rules = _rules(plugin.job.extract)
    with connect(plugin.workers) as client, open_dispatcher(client, plugin, rules) as dispatcher:
        n_samples = _commit_all(n_rows, dispatcher, writer, started)
        return n_samples, dispatcher.retries


def _rules(config: ExtractConfig) -> RetryRules:
    return RetryRules(
        setting="extract.shard_seconds",
        seconds=config.shard_seconds,
        least_seconds=600.0,
        first_seconds=3600.0,
        retry_job_errors=True,
    )


def _commit_all(n_rows: Mapping[Shard, int], dispatcher: Dispatcher, writer: StoreWriter, started: float) -> int:
    """Hand out shards, given with their rows, and commit each one that is written; returns the number of samples."""
    n_samples, lap, waiting = 0, started, iter(n_rows)

    def submit(at_most: int) -> dict[Future[dict[str, Any]], Shard]:
        return {dispatcher.submit(shard, _name(shard)): shard for shard in islice(waiting, at_most)}

    with progress("extracting", sum(n_rows.values()), "samples") as advance:
        submitted = submit(_IN_FLIGHT)
        while submitted:
            for future in wait(submitted, return_when=FIRST_COMPLETED).done:
                shard, written = submitted.pop(future), future.result()
                now = time.perf_counter()
                status = np.array(written["status"], np.uint8)
                writer.log_and_mark(
                    *shard,
                    status,
                    seconds=now - lap,
                    forward_seconds=written["forward_seconds"],
                    skipped=written["skipped"],
                )
                lap, n_samples = now, n_samples + int((status == STORED).sum())
                advance(n_rows[shard])
                submitted |= submit(1)
    return n_samples


def _name(shard: Shard) -> str:
    return f"shard {shard[1]} of {shard[0]}"
