"""Runs units of training on dask workers, by the code that extraction uses."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from adapt.config.pipeline import TrainConfig
from adapt.job.executor import Log, Unit
from extract.job.cluster import connect
from extract.job.dispatch import Dispatcher, open_dispatcher
from extract.job.retry_rules import RetryRules
from extract.job.task_plugin import TaskPlugin
from extract.job.workers import Workers

_DAY = 86_400.0


class UnitPlugin(TaskPlugin):
    """Runs units on a worker.

    Args:
        workers: the workers of the job.
        device: as configured; see `TaskPlugin.device`.
    """

    def __init__(self, workers: Workers, device: str) -> None:
        super().__init__(f"sidecache-{uuid4().hex}", workers)
        self._device = device

    def compute(self, task: Unit) -> Any:
        """Run a unit; its lines are sent to the job."""
        return task.run(self.log, self.device(self._device))


class OnCluster:
    """Runs units on dask workers, each in one of them.

    A unit whose worker dies or hangs is started again on another one. An error of the unit is final: it would come
    again, since training is deterministic.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def submit(self, unit: Unit) -> Future[Any]:
        """See `Executor`; raises UserError if the unit cannot be pickled."""
        return self._dispatcher.submit(unit, unit.name)


@contextmanager
def open_cluster(train: TrainConfig, workers: Workers, log: Log) -> Iterator[OnCluster]:
    """An executor on `train.workers` processes of this machine, or on the workers of `train.scheduler`."""
    rules = RetryRules(
        setting="train.trial_seconds",
        seconds=train.trial_seconds,
        least_seconds=_DAY,
        first_seconds=_DAY,
        retry_job_errors=False,
    )
    plugin = UnitPlugin(workers, train.device)
    with connect(workers) as client, open_dispatcher(client, plugin, rules, log) as dispatcher:
        yield OnCluster(dispatcher)
