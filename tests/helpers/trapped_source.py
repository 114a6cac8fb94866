"""Wraps a source with traps: samples that kill or stop the worker that decodes them, or fail."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extract.sources.open_source import ImageSource, ImageSplit
from store.errors import JobError


@dataclass(frozen=True)
class Trap:
    """Performs `act` (die, stop or fail) in workers, `times` times; the folder `counter` has a file for each time.

    The process that made it is spared, because it decodes samples too, to calibrate int8.
    """

    act: str
    times: int
    counter: Path
    spared: int = field(default_factory=os.getpid)

    def spring(self) -> None:
        """Perform the act, unless it was performed often enough or this process is spared."""
        n_sprung = len(list(self.counter.iterdir()))
        if os.getpid() != self.spared and n_sprung < self.times:
            (self.counter / str(n_sprung)).touch()
            getattr(self, f"_{self.act}")()

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _fail(self) -> None:
        raise JobError("the disk blinked")


@dataclass(frozen=True)
class TrappedSplit:
    """An ImageSplit with traps at some rows."""

    split: ImageSplit
    traps: Mapping[int, Trap]

    @property
    def ids(self) -> Any:
        """See ImageSplit."""
        return self.split.ids

    @property
    def labels(self) -> Any:
        """See ImageSplit."""
        return self.split.labels

    @property
    def validation(self) -> Any:
        """See ImageSplit."""
        return self.split.validation

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Any:
        if row in self.traps:
            self.traps[row].spring()
        return self.split[row]

    def digest(self, row: int) -> bytes:
        """See ImageSplit."""
        return self.split.digest(row)


def lay_traps(source: ImageSource, traps: Mapping[int, Trap]) -> ImageSource:
    """The source with traps at rows of its training split."""
    for trap in traps.values():
        trap.counter.mkdir()
    return replace(source, splits={**source.splits, "train": TrappedSplit(source.splits["train"], traps)})
