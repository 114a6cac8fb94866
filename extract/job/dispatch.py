"""Hands tasks to dask workers, and starts a task again if its worker dies, hangs or is lost.

One thread owns all state. It takes messages from an inbox: new tasks, events of workers, and finished futures of dask.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from distributed import Client, KilledWorker
from distributed.protocol.pickle import dumps, loads

from extract.job.retry_rules import RETRIES, RetryRules
from extract.job.task_plugin import TaskPlugin, run_on_worker
from extract.job.workers import Workers
from store.errors import JobError, UserError

_POLL_SECONDS, _RESTART_SECONDS = 0.5, 60

Message = Callable[[], None]


@dataclass(eq=False, kw_only=True)
class _Task:
    """A task that is neither finished nor failed.

    Attributes:
        number: identifies it in events.
        name: for messages.
        payload: the pickled task.
        priority: of waiting tasks, those with the highest start first.
        promise: the future that the caller got.
        submitted: the future of dask.
        result: pickled, as its worker reported it.
    """

    number: int
    name: str
    payload: bytes
    priority: int
    promise: Future[Any] = field(default_factory=Future)
    submitted: Any = None
    result: bytes = b""


@contextmanager
def open_dispatcher(
    client: Client, plugin: TaskPlugin, rules: RetryRules, log: Callable[[str], None] = lambda _: None
) -> Iterator["Dispatcher"]:
    """Send a plugin to all workers, also to those that join later, and hand them tasks until the block ends.

    Tasks that are not finished when the block ends are canceled.

    Args:
        client: of the workers.
        plugin: computes the tasks.
        rules: time limit and retries.
        log: is called with the lines that the plugin logs, from another thread.

    Raises:
        UserError: the plugin cannot be pickled.
    """
    with _registered(client, plugin):
        dispatcher = Dispatcher(client, plugin, rules, log)
        try:
            yield dispatcher
        except BaseException as error:
            # not waited for after an interrupt, which may have struck while this thread held the lock of a future
            dispatcher.close(wait=isinstance(error, Exception))
            raise
        dispatcher.close()


@contextmanager
def _registered(client: Client, plugin: TaskPlugin) -> Iterator[None]:
    try:
        client.register_plugin(plugin)
    except TypeError as error:
        raise _unpicklable(plugin.workers, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # a worker that has just died; the scheduler has forgotten the plugin before it asks
            client.unregister_worker_plugin(plugin.name)


def _unpicklable(workers: Workers, error: Exception) -> UserError:
    return UserError(
        f"the samples or the backbone cannot be sent to other processes ({error}); define their classes at the top "
        f"of a module, or leave {workers.section}.workers at 1"
    )


class Dispatcher:
    """Submits tasks to workers, and retries those that fail; see `open_dispatcher`."""

    def __init__(self, client: Client, plugin: TaskPlugin, rules: RetryRules, log: Callable[[str], None]) -> None:
        self._client, self._topic, self._workers, self._rules, self._log = (
            client,
            plugin.name,
            plugin.workers,
            rules,
            log,
        )
        self._inbox, self._numbers = SimpleQueue[Message | None](), itertools.count()
        self._closed, self._closing = False, Lock()
        # owned by the thread
        self._tasks: dict[int, _Task] = {}
        self._running: dict[int, tuple[str, float]] = {}  # worker, time of start
        self._starts, self._slowest = Counter[int](), 0.0
        self._thread = Thread(target=self._serve, name="dispatch", daemon=True)
        client.subscribe_topic(self._topic, self._on_event)
        self._thread.start()

    @property
    def retries(self) -> int:
        """How many times tasks were started again."""
        return self._starts.total() - len(self._starts)

    def submit(self, task: Any, name: str, priority: int = 0) -> Future[Any]:
        """Hand a task to the workers; may be called from several threads.

        Args:
            task: what the plugin computes from; it is pickled.
            name: of the task, for messages.
            priority: of waiting tasks, those with the highest start first.

        Returns:
            a future of what the plugin returns; its error is a UserError, or a JobError if the task failed otherwise or
            was started too often.

        Raises:
            UserError: the task cannot be pickled.
        """
        try:
            payload = dumps(task)
        except Exception as error:  # pickle calls methods of the task, which may raise anything
            raise _unpicklable(self._workers, error) from error
        record = _Task(number=next(self._numbers), name=name, payload=payload, priority=priority)
        with self._closing:
            if self._closed:
                raise RuntimeError("the dispatcher is closed")
            self._inbox.put(partial(self._add, record))
        return record.promise

    def close(self, wait: bool = True) -> None:
        """Cancel what is not finished, and end the thread; `wait` until it has ended."""
        with self._closing:
            self._closed = True
            self._inbox.put(None)
        if wait:
            self._thread.join()
            self._client.unsubscribe_topic(self._topic)

    def _serve(self) -> None:
        """Handle messages until the dispatcher is closed; if dask fails, as without its scheduler, all tasks do."""
        while True:
            try:
                message = self._inbox.get(timeout=_POLL_SECONDS)
            except Empty:
                message = self._restart_hung_workers
            if message is None:
                break
            try:
                message()
                self._restart_hung_workers()
            except Exception as error:
                for task in list(self._tasks.values()):
                    self._fail(task, _failure(task, error))
        for task in self._tasks.values():
            task.promise.cancel()
        with suppress(Exception):  # after an interrupt the client may be closed
            self._client.cancel([task.submitted for task in self._tasks.values() if task.submitted])

    def _add(self, task: _Task) -> None:
        self._tasks[task.number] = task
        self._submit(task)

    def _submit(self, task: _Task) -> None:
        task.submitted = self._client.submit(
            run_on_worker, self._topic, task.number, task.payload, pure=False, priority=task.priority
        )
        task.submitted.add_done_callback(lambda submitted: self._inbox.put(partial(self._end, task, submitted)))

    def _on_event(self, event: tuple[float, dict[str, Any]]) -> None:
        """Take an event of a worker, see `TaskPlugin`; dask calls this in its own thread."""
        self._inbox.put(partial(self._record, event[1]))

    def _record(self, event: dict[str, Any]) -> None:
        """Record that a worker started or computed a task, or log a line."""
        if "line" in event:
            self._log(event["line"])
            return
        number, now = event["task"], time.monotonic()
        task = self._tasks.get(number)
        if "result" in event:
            _, since = self._running.pop(number, ("", now))
            self._slowest = max(self._slowest, now - since)
            if task:
                task.result = event["result"]
            return
        self._starts[number] += 1
        self._running[number] = (event["worker"], now)
        if task and self._starts[number] > 1 + RETRIES:
            self._fail(task, self._too_many_starts(task))

    def _end(self, task: _Task, submitted: Any) -> None:
        """Take the result of a task, whose event arrives before dask reports its end; retry it or let it fail."""
        if submitted is not task.submitted:  # it has failed before
            return
        if submitted.status == "finished":
            self._forget(task)
            if task.promise.set_running_or_notify_cancel():
                task.promise.set_result(loads(task.result))
            return
        self._running.pop(task.number, None)
        error = submitted.exception()
        # counted by starts: dask also blames a worker's death on tasks that were only queued there
        may_retry = self._starts[task.number] <= RETRIES
        final: Exception | None
        if isinstance(error, KilledWorker):
            final = None if may_retry else self._too_many_starts(task)
        elif isinstance(error, JobError):
            final = None if may_retry and self._rules.retry_job_errors else error
        else:
            final = error if isinstance(error, UserError) else _failure(task, error)
        if final:
            self._fail(task, final)
        else:
            self._submit(task)

    def _fail(self, task: _Task, error: Exception) -> None:
        self._forget(task)
        if task.promise.set_running_or_notify_cancel():
            task.promise.set_exception(error)

    def _forget(self, task: _Task) -> None:
        """Drop a task; if a worker still computes it, this worker is watched until it ends or hangs."""
        del self._tasks[task.number]
        submitted, task.submitted = task.submitted, None
        if submitted and not submitted.done():
            self._client.cancel([submitted])

    def _restart_hung_workers(self) -> None:
        """Restart workers that exceed the time limit, except those without a nanny, which dask cannot restart."""
        limit, now = self._rules.limit(self._slowest), time.monotonic()
        hung = {worker for worker, since in self._running.values() if now - since > limit}
        if not hung:
            return
        for number, (worker, _) in self._running.items():
            if worker in hung and number in self._tasks and self._starts[number] > RETRIES:
                self._fail(self._tasks[number], self._too_many_starts(self._tasks[number]))
        self._running = {number: run for number, run in self._running.items() if run[0] not in hung}
        living = self._client.scheduler_info(n_workers=-1)["workers"]
        restarted = sorted(worker for worker in hung if worker in living and living[worker]["nanny"])
        if restarted:
            self._client.restart_workers(restarted, timeout=_RESTART_SECONDS, raise_for_error=False)

    def _too_many_starts(self, task: _Task) -> JobError:
        return JobError(
            f"{task.name} was started {1 + RETRIES} times, and each time its worker died or made no progress for "
            f"{self._rules.limit(self._slowest):,.0f} s; check its samples, the workers' memory, and "
            f"{self._rules.setting}"
        )


def _failure(task: _Task, error: Exception | None) -> JobError:
    """A JobError in place of an error of another kind; without one, dask lost the connection to its scheduler."""
    cause = f"{type(error).__name__}: {error}" if error else "the connection to the dask scheduler was lost"
    failure = JobError(f"{task.name} failed: {cause}")
    failure.__cause__ = error
    return failure
