"""Runs the tasks of a job in dask workers, and reports the start and the result of each to the job."""

import re
from abc import ABC, abstractmethod
from threading import Lock
from typing import Any

import torch
from distributed import Worker, WorkerPlugin, get_worker
from distributed.protocol.pickle import dumps, loads
from distributed.utils import sync

from extract.forward.device import configure_process
from extract.job.workers import Workers


class TaskPlugin(WorkerPlugin, ABC):
    """Carries what all tasks of a job share to every worker of the cluster, also to workers that join later.

    Args:
        name: differs from job to job; the plugin and the job's events are registered under it.
        workers: the workers of the job.
    """

    def __init__(self, name: str, workers: Workers) -> None:
        self.name, self.workers = name, workers

    def setup(self, worker: Worker) -> None:
        """See `WorkerPlugin`."""
        self._worker, self._mutex = worker, Lock()

    @abstractmethod
    def compute(self, task: Any) -> Any:
        """Compute a task; its result is pickled and sent to the job."""

    def run(self, number: int, task: bytes) -> None:
        """Compute a pickled task; the threads of a worker take turns.

        Start and result are sent to the job as events: the result of a dask task would stay on the worker, and be lost
        with it.
        """
        with self._mutex:
            self._send({"task": number, "worker": self._worker.address})
            if self.workers.threads:
                torch.set_num_threads(self.workers.threads)
            result = self.compute(loads(task))
            self._send({"task": number, "result": dumps(result)})

    def log(self, line: str) -> None:
        """Send a line to the job, which logs it."""
        self._send({"line": line})

    def device(self, device: str) -> str:
        """The device to compute on: one GPU for each worker that sees several, by the number in its name.

        Args:
            device: as configured.
        """
        return device_of_worker(device, self._worker.name)

    def _send(self, event: dict[str, Any]) -> None:
        """Return once the scheduler has received it; `Worker.log_event` buffers, and a worker's death loses that."""
        sync(self._worker.loop, self._worker.scheduler.log_event, topic=self.name, msg=event)


def run_on_worker(name: str, number: int, task: bytes) -> None:
    """The dask task; `name` is that of the job's plugin."""
    configure_process()
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, TaskPlugin)
    plugin.run(number, task)


def device_of_worker(device: str, worker_name: Any) -> str:
    """One GPU for each worker that sees several, by the number in its name: 3, NAME-3; an address has none."""
    n_gpus, number = torch.cuda.device_count(), re.fullmatch(r"(?:.*-)?(\d+)", str(worker_name))
    if device not in ("auto", "cuda") or n_gpus < 2 or not number:
        return device
    return f"cuda:{int(number[1]) % n_gpus}"
