"""Units of training that do nothing but succeed, fail, hang, or end their worker; workers import them by name."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from store.errors import JobError, UserError

Log = Any
ERRORS = {"user": UserError("the folder is empty"), "job": JobError("diverged"), "other": KeyError("head")}


@dataclass(frozen=True)
class Square:
    """Squares a number."""

    number: int

    @property
    def name(self) -> str:
        return f"square {self.number}"

    def run(self, log: Log, device: str) -> dict[str, Any]:
        log(f"{self.name} on {device}")
        return {"square": self.number**2, "process": os.getpid(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Noted:
    """Appends its name to a file when it starts, and takes a moment."""

    name: str
    starts: Path

    def run(self, log: Log, device: str) -> None:
        with self.starts.open("a") as file:
            file.write(f"{self.name}\n")
        time.sleep(0.2)


@dataclass(frozen=True)
class Failing:
    """Raises one of `ERRORS`; the folder has a file for each start."""

    error: str
    starts: Path

    @property
    def name(self) -> str:
        return f"unit {self.error}"

    def run(self, log: Log, device: str) -> None:
        count_start(self.starts)
        raise ERRORS[self.error]


@dataclass(frozen=True)
class Deadly:
    """Ends its worker the first `times` times; the folder has a file for each start."""

    times: int
    starts: Path
    name: str = "deadly unit"

    def run(self, log: Log, device: str) -> int:
        n_starts = count_start(self.starts)
        if n_starts <= self.times:
            os._exit(1)
        return n_starts


@dataclass(frozen=True)
class Hanging:
    """Makes no progress the first `times` times; the folder has a file for each start."""

    times: int
    starts: Path
    name: str = "hanging unit"

    def run(self, log: Log, device: str) -> int:
        n_starts = count_start(self.starts)
        if n_starts <= self.times:
            time.sleep(3600)
        return n_starts


@dataclass(frozen=True)
class Unpicklable:
    """Cannot be sent to another process."""

    name: str = "unit"
    lock: Any = field(default_factory=Lock)

    def run(self, log: Log, device: str) -> None:
        """Do nothing."""


def count_start(folder: Path) -> int:
    """Add a file to a folder; returns how many there are."""
    folder.mkdir(exist_ok=True)
    (folder / str(n_starts := len(list(folder.iterdir())) + 1)).touch()
    return n_starts
