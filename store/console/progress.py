"""Shows how far work is: bars on a terminal, else a line every half a minute.

Work that is started inside other work of the same thread is shown below it: a pass over the features below the whole
job.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from store.console.duration import duration
from store.console.log import log
from store.console.visible import one_line

_SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 12


@runtime_checkable
class Advance(Protocol):
    """Adds the units that were just done, and a note such as the loss, which stays until the next one."""

    def __call__(self, units: int, note: str = "") -> None:
        """Add units."""
        ...


class _RateOrNote(ProgressColumn):
    """A column with the note of the work, else with units per second."""

    def render(self, task: Task) -> Text:
        if task.fields["note"]:
            return Text(task.fields["note"])
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class _Work:
    """Work of a thread that is not finished.

    Args:
        description: what is done, on one line.
        total: number of its units.
        unit: their name in the plural.
        done: units that were done before.
    """

    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.note = ""
        self._before, self._started = done, time.monotonic()

    def line(self, outer: "_Work | None") -> str:
        """Such as `extracting train: 1,200 of 5,000 samples, 40.1 samples/s, 1 min 35 s left`."""
        done = f"{self.description}: {self.done:,} of {self.total:,} {self.unit}"
        rate = f"{self._rate():,.1f} {self.unit}/s" if self._rate() else ""
        text = ", ".join(filter(None, [done, rate, self._left(), self.note]))
        if outer is None:
            return text
        whole = ", ".join(filter(None, [f"{outer.done / max(1, outer.total):.0%}", outer._left()]))
        return f"{text}; {outer.description}: {whole}"

    def _rate(self) -> float:
        return (self.done - self._before) / max(1e-9, time.monotonic() - self._started)

    def _left(self) -> str:
        return f"{duration((self.total - self.done) / self._rate())} left" if self._rate() else ""


class _Display:
    """Where the work of a thread is shown: bars on a terminal, else lines of the log.

    Args:
        bars: of the terminal, if there is one.
    """

    def __init__(self, bars: Progress | None) -> None:
        self.work: list[_Work] = []  # outermost first
        self._bars, self._line_at = bars, time.monotonic()

    @contextmanager
    def show(self, work: _Work) -> Iterator[Advance]:
        """Show work until the block ends."""
        outer, task = (self.work[0] if self.work else None), self._add(work)
        self.work.append(work)

        def advance(units: int, note: str = "") -> None:
            work.done += units
            work.note = note or work.note
            if self._bars is not None and task is not None:
                self._bars.update(task, advance=units, note=work.note)
            elif time.monotonic() - self._line_at >= _SECONDS_BETWEEN_LINES:
                self._line_at = time.monotonic()
                log(work.line(outer))

        try:
            yield advance
        finally:
            self.work.remove(work)
            if self._bars is not None and task is not None:
                self._bars.refresh()
                self._bars.remove_task(task)

    def _add(self, work: _Work) -> TaskID | None:
        if self._bars is None:
            return None
        return self._bars.add_task(work.description, total=work.total, completed=work.done, unit=work.unit, note="")


class _OfThread(threading.local):
    """The display of this thread, while there is work."""

    display: _Display | None = None


_of_thread = _OfThread()


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show on standard error how far a block is; call the yielded function with the units that were just done.

    Args:
        description: what is done.
        total: number of its units.
        unit: their name in the plural.
        done: units that were done before, by an interrupted run.
    """
    work = _Work(one_line(description), total, unit, done)
    if _of_thread.display is not None:
        with _of_thread.display.show(work) as advance:
            yield advance
        return
    with _bars() as bars:
        _of_thread.display = _Display(bars)
        try:
            with _of_thread.display.show(work) as advance:
                yield advance
        finally:
            _of_thread.display = None


@contextmanager
def _bars() -> Iterator[Progress | None]:
    """Bars on the terminal, from one process of torchrun; None off a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        _RateOrNote(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield bars
