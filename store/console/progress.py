"""Shows progress bars with rate and time left, on a terminal only: nothing is printed to files or pipes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from store.console.visible import one_line


class _Rate(ProgressColumn):
    """A column with units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error while the block runs; call the yielded function with the units just done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"  # one process of torchrun
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        task = bars.add_task(one_line(description), total=total, unit=unit)
        yield lambda units: bars.advance(task, units)
