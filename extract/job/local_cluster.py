"""Starts a dask cluster of worker processes on this machine that only its own job can reach.

A dask scheduler or worker runs any code that is sent to it. Listening on loopback keeps out other machines, but not
other users of this one, so every connection needs the job's certificate. It is made for the job, stays in memory, and
reaches the workers through the pipe that starts them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker

from store.errors import JobError

_SETTINGS = {"distributed.worker.daemon": True, "distributed.worker.multiprocessing-method": "spawn"}


class _Scheduler(Scheduler):
    def start_http_server(self, *_: Any, **__: Any) -> None:
        """Not started: dask's web pages and metrics need no certificate."""


class _Worker(Worker):
    def start_http_server(self, *_: Any, **__: Any) -> None:
        """See `_Scheduler`."""


@contextmanager
def local_cluster(n_workers: int, settings: Mapping[str, Any]) -> Iterator[Client]:
    """A client of `n_workers` processes of one thread each; they end with the block.

    Args:
        settings: dask's configuration while the block runs.

    Raises:
        JobError: the workers do not start.
    """
    with (
        TemporaryDirectory(prefix="sidecache-") as scratch,  # dask's default folder may belong to another user
        dask.config.set({**_SETTINGS, **settings, "temporary-directory": scratch}),
        _start(n_workers) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _start(n_workers: int) -> SpecCluster:
    security = Security.temporary()
    common = {"host": "127.0.0.1", "protocol": "tls://", "security": security}
    scheduler = {"cls": _Scheduler, "options": {**common, "dashboard": False}}
    options = {
        **common,
        "worker_class": _Worker,
        "nthreads": 1,
        "memory_limit": 0,  # a shard's buffers are bounded; dask's limit would kill workers with large backbones
        "silence_logs": "CRITICAL",
    }
    workers = {number: {"cls": Nanny, "options": options} for number in range(n_workers)}
    try:
        return SpecCluster(workers, scheduler, security=security, silence_logs="CRITICAL")
    except RuntimeError as error:
        raise JobError(
            f"worker processes did not start ({error.__cause__ or error}); see their output above"
        ) from error
