"""Steps in before each write of a job: to look at what it has written so far, or to kill it there.

A job that is killed goes on in this process: that write and all that follow never happen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tensorstore as ts

from store.kvstore import KeyValueStore


class KilledError(BaseException):
    """Nothing that the code under test may catch."""


class Death:
    """Counts writes and deletions, and after `at` of them lets no more happen."""

    def __init__(self, at: float) -> None:
        self.at, self.writes = at, 0

    def step(self) -> None:
        if self.writes >= self.at:
            raise KilledError
        self.writes += 1


@contextmanager
def killed_at(at: float) -> Iterator[Death]:
    """In the block, only so many writes happen."""
    death = Death(at)
    with before_each_write(death.step):
        yield death


@contextmanager
def before_each_write(step: Callable[[], None]) -> Iterator[None]:
    """In the block, call `step` before each write and deletion. Those to the lock do not count: nobody dies with it."""

    def stepped(call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*given: Any, **named: Any) -> Any:
            step()
            done = call(*given, **named)
            if done is not None:
                done.result()  # nothing is under way at the next step
            return done

        return write

    with (
        mock.patch.object(KeyValueStore, "write_bytes", stepped(KeyValueStore.write_bytes)),
        mock.patch.object(KeyValueStore, "write_files", stepped(KeyValueStore.write_files)),
        mock.patch.object(KeyValueStore, "_remove", stepped(KeyValueStore._remove)),
        mock.patch.object(ts.TensorStore, "write", stepped(ts.TensorStore.write)),
    ):
        yield
