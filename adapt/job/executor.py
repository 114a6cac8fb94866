"""Runs units of training, such as one trial from one seed: in this process, or on the workers of a dask cluster."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

from adapt.config.pipeline import TrainConfig
from adapt.training.distributed import world
from extract.job.workers import Workers
from store.errors import UserError

Log = Callable[[str], None]


Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Unit(Protocol):
    """A piece of training that needs no other one; it can be pickled.

    A unit may be run more than once: if its worker dies after it has written its results, it is started again.
    """

    @property
    def name(self) -> str:
        """For messages, such as `losa seed 0`."""

    def run(self, log: Log, device: str) -> Any:
        """Train; returns a small result that can be pickled.

        Args:
            log: is called with lines for the user.
            device: to train on, instead of `train.device`; on a machine with several GPUs each worker has its own.
        """


UnitType = TypeVar("UnitType", bound=Unit)


@runtime_checkable
class Executor(Protocol):
    """Runs units; `open_executor` makes one."""

    def for_part(self, part: int) -> "Executor":
        """The same executor for a part of a study: of waiting units, those of the lowest part start first."""

    def submit(self, unit: Unit) -> Future[Any]:
        """Run a unit; may be called from several threads.

        Returns:
            a future of the result of `Unit.run`, or of its error; other units go on after an error.
        """

    def results(self, units: Sequence[UnitType]) -> Iterator[tuple[UnitType, Any]]:
        """Every unit with its result, as they are finished.

        Raises:
            UserError, JobError: a unit failed; elsewhere than in this process the others have been run then.
        """

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call a function that submits units on every item: at the same time, if units run elsewhere."""


@contextmanager
def open_executor(train: TrainConfig, log: Log) -> Iterator[Executor]:
    """An executor for the workers that `train:` asks for; units that are not finished when the block ends are canceled.

    Args:
        train: `workers`, `scheduler`, `trial_seconds` and `device`.
        log: is called with the lines that units log; lines of workers come from another thread.

    Raises:
        UserError: the scheduler does not answer, or torchrun has started several processes already.
        JobError: the workers do not start.
    """
    workers = Workers(section="train", count=train.workers, scheduler=train.scheduler)
    if not workers.are_needed:
        yield InProcess(log, train.device)
        return
    if (n_processes := world().size) > 1:
        raise UserError(
            f"torchrun has started {n_processes} processes, which train each trial together; train.workers and "
            "train.scheduler give every trial to one process: use one or the other"
        )
    from adapt.job.training_cluster import open_cluster  # importing dask takes half a second

    with open_cluster(train, workers, log) as cluster:
        yield cluster


class InProcess:
    """Runs every unit at once in this process; units of several threads take turns."""

    def __init__(self, log: Log, device: str) -> None:
        self._log, self._device, self._mutex = log, device, Lock()

    def for_part(self, part: int) -> "InProcess":
        """See `Executor`; parts are worked through in their order anyway."""
        return self

    def submit(self, unit: Unit) -> Future[Any]:
        """See `Executor`; an interrupt is raised here."""
        future: Future[Any] = Future()
        with self._mutex:
            try:
                result = unit.run(self._log, self._device)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        return future

    def results(self, units: Sequence[UnitType]) -> Iterator[tuple[UnitType, Any]]:
        """See `Executor`; a unit starts when its result is asked for."""
        for unit in units:
            yield unit, self.submit(unit).result()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """See `Executor`."""
        return [function(item) for item in items]
