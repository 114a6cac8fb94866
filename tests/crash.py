"""A process that is killed at its k-th write, in this one: that write and all that follow never happen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tensorstore as ts

from store.backend import Folder


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
    """In the block, only so many writes happen. Those to the lock do not count: nobody dies with it here."""
    death = Death(at)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            death.step()
            done = call(*given, **named)
            if done is not None:
                done.result()  # nothing is under way at the time of death
            return done

        return step

    with (
        mock.patch.object(Folder, "write_bytes", counted(Folder.write_bytes)),
        mock.patch.object(Folder, "write_files", counted(Folder.write_files)),
        mock.patch.object(Folder, "_remove", counted(Folder._remove)),
        mock.patch.object(ts.TensorStore, "write", counted(ts.TensorStore.write)),
    ):
        yield death
