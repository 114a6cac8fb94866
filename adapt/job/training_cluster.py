"""Runs units of training on dask workers, by the code that extraction uses."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from adapt.config.pipeline import TrainConfig
from adapt.job.executor import Item, Log, Result, Unit, UnitType
from extract.job.cluster import connect
from extract.job.dispatch import Dispatcher, open_dispatcher
from extract.job.retry_rules import RetryRules
from extract.job.task_plugin import TaskPlugin
from extract.job.workers import Workers

_DAY = 86_400.0
_MOST_THREADS = 4_096  # that wait for units: one a part of a study, and one a method of it


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

    def __init__(self, dispatcher: Dispatcher, threads: ThreadPoolExecutor, part: int = 0) -> None:
        self._dispatcher, self._threads, self._part = dispatcher, threads, part

    def for_part(self, part: int) -> "OnCluster":
        """See `Executor`."""
        return OnCluster(self._dispatcher, self._threads, part)

    def submit(self, unit: Unit) -> Future[Any]:
        """See `Executor`; raises UserError if the unit cannot be pickled."""
        return self._dispatcher.submit(unit, unit.name, priority=-self._part)

    def results(self, units: Sequence[UnitType]) -> Iterator[tuple[UnitType, Any]]:
        """See `Executor`."""
        futures, errors = {self.submit(unit): unit for unit in units}, list[BaseException]()
        for future in as_completed(futures):
            if (error := future.exception()) is None:
                yield futures[future], future.result()
            else:
                errors.append(error)
        if errors:
            raise errors[0]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """See `Executor`; a function that fails leaves the others to end."""
        futures = [self._threads.submit(function, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]


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
    with (
        # ended last: its threads wait for units, which end with the dispatcher
        ThreadPoolExecutor(_MOST_THREADS, "sidecache-methods") as threads,
        connect(workers) as client,
        open_dispatcher(client, plugin, rules, log) as dispatcher,
    ):
        yield OnCluster(dispatcher, threads)
