"""Calls a function before each write of a job, to inspect the store there or to simulate a kill.

A simulated kill is an exception in this process: that write and all that follow do not happen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tensorstore as ts

from store.kvstore import KeyValueStore


class KilledError(BaseException):
    """A simulated kill, which the code under test does not catch."""


class WriteCounter:
    """Counts writes and deletions, and raises KilledError after `limit` of them."""

    def __init__(self, limit: float) -> None:
        self.limit, self.writes = limit, 0

    def step(self) -> None:
        """Count a write."""
        if self.writes >= self.limit:
            raise KilledError
        self.writes += 1


@contextmanager
def killed_at(limit: float) -> Iterator[WriteCounter]:
    """Let only that many writes happen in the block."""
    counter = WriteCounter(limit)
    with before_each_write(counter.step):
        yield counter


@contextmanager
def before_each_write(step: Callable[[], None]) -> Iterator[None]:
    """Call `step` before each write and deletion in the block, except those of the lock."""

    def stepped(call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*given: Any, **named: Any) -> Any:
            step()
            future = call(*given, **named)
            if future is not None:
                future.result()  # no write is in progress at the next step
            return future

        return write

    with (
        mock.patch.object(KeyValueStore, "write_bytes", stepped(KeyValueStore.write_bytes)),
        mock.patch.object(KeyValueStore, "write_files", stepped(KeyValueStore.write_files)),
        mock.patch.object(KeyValueStore, "_remove", stepped(KeyValueStore._remove)),
        mock.patch.object(ts.TensorStore, "write", stepped(ts.TensorStore.write)),
    ):
        yield
