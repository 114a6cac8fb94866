"""Connects a job to dask workers: to those of a scheduler that is already running, or to a local cluster of its own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

from extract.job.local_cluster import local_cluster
from extract.job.retry_rules import RETRIES
from extract.job.workers import Workers
from store.errors import Note, UserError

_CONNECT_SECONDS, _START_SECONDS = 30, 600


@contextmanager
def connect(workers: Workers) -> Iterator[Client]:
    """A client of the scheduler of the configuration, or of a local cluster that is started for this job alone.

    Raises:
        UserError: the scheduler does not answer.
        JobError: local workers do not start.
    """
    if workers.scheduler:
        try:
            client = Client(workers.scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no dask scheduler answers at {workers.section}.scheduler {workers.scheduler!r} ({error}); start one "
                f"with `dask scheduler`, or set {workers.section}.workers alone"
            ) from error
        with client:
            _note_if_open(workers.scheduler)
            client.wait_for_workers(workers.count)
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": RETRIES,
        # By default dask gives up on a worker that takes 15 s to restart, and a job without workers would hang; loading
        # torch alone may take longer.
        "distributed.deploy.lost-worker-timeout": f"{_START_SECONDS} s",
        "distributed.scheduler.no-workers-timeout": f"{_START_SECONDS} s",
    }
    with local_cluster(workers.count, settings) as client:
        yield client


def _note_if_open(address: str) -> None:
    if not address.startswith(("tls://", "wss://")):
        warnings.warn(
            f"the scheduler {address} asks for no certificate: anyone who can reach it or its workers can run code "
            "there in your name; on a network that others use, start it with TLS (docs/clusters.md)",
            Note,
            stacklevel=2,
        )
