"""Samples that are traps for whoever decodes them: it dies, stands still, or fails. Workers import this module."""

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
    """`act` strikes workers as often as there are `times`; `counter` is a folder that counts.

    The process that laid it is spared: it decodes samples too, to calibrate int8.
    """

    act: str
    times: int
    counter: Path
    spared: int = field(default_factory=os.getpid)

    def spring(self) -> None:
        struck = len(list(self.counter.iterdir()))
        if os.getpid() != self.spared and struck < self.times:
            (self.counter / str(struck)).touch()
            getattr(self, f"_{self.act}")()

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _fail(self) -> None:
        raise JobError("the disk blinked")


@dataclass(frozen=True)
class TrappedSplit:
    split: ImageSplit
    traps: Mapping[int, Trap]

    @property
    def ids(self) -> Any:
        return self.split.ids

    @property
    def labels(self) -> Any:
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Any:
        if row in self.traps:
            self.traps[row].spring()
        return self.split[row]

    def digest(self, row: int) -> bytes:
        return self.split.digest(row)


def lay_traps(source: ImageSource, traps: Mapping[int, Trap]) -> ImageSource:
    """The source with traps at rows of its training split."""
    for trap in traps.values():
        trap.counter.mkdir()
    return replace(source, splits={**source.splits, "train": TrappedSplit(source.splits["train"], traps)})
