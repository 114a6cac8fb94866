"""Traces to a file what the processes of a job are writing, so that a test knows what it interrupts.

A line is `seconds process thread phase place`, on a clock that all processes share. A write within another one, such as
the lock's before a shard's, has its own lines. Workers of dask trace themselves if this module is their preload; it
imports only what the job imports.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from store.kvstore import LOCK, KeyValueStore
from store.writer import StoreWriter

DATA, COMMIT, METADATA, NOTHING = "data", "commit", "metadata", "nothing"
PHASES = (DATA, COMMIT, METADATA, NOTHING)
FILE = "SIDECACHE_TEST_TRACE"  # names the file to workers
_LOCK_PLACE = f"{LOCK}/zarr.json"


class Note(NamedTuple):
    """One line of the trace."""

    seconds: float
    process: int
    thread: int
    phase: str
    place: str

    @property
    def is_of_store(self) -> bool:
        """Whether a write starts here that is not the lock's."""
        return self.phase != NOTHING and self.place != _LOCK_PLACE


def trace_writes(path: Path) -> None:
    """From now on, trace the writes of this process."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    thread = threading.local()

    def note(phase: str, place: str) -> None:
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        os.write(file, f"{now:.6f} {os.getpid()} {threading.get_native_id()} {phase} {place}\n".encode())

    def wrap(owner: type, name: str, phase: str, place_of: Callable[..., str]) -> None:
        call = getattr(owner, name)

        def noted(self: Any, *given: Any, **named: Any) -> Any:
            outer = getattr(thread, "current", (NOTHING, "-"))
            thread.current = phase, place_of(self, *given)
            note(*thread.current)
            try:
                return call(self, *given, **named)
            finally:
                thread.current = outer
                note(*outer)

        setattr(owner, name, noted)

    def shard(writer: Any, split: str, number: int, *given: Any) -> str:
        return f"{writer._marks.value}{split}/{number}"

    wrap(StoreWriter, "write", DATA, shard)
    wrap(StoreWriter, "mark", COMMIT, shard)
    for name in ("write_bytes", "write_if"):
        wrap(KeyValueStore, name, METADATA, lambda kvstore, key, *given: str(key))
    wrap(KeyValueStore, "_remove", METADATA, lambda kvstore, keys: "deletion")


def dask_setup(worker: object) -> None:
    """See `distributed.worker.preload`."""
    trace_writes(Path(os.environ[FILE]))


class Trace:
    """The lines of a trace so far.

    Attributes:
        shard: the shard whose data were begun last.
        begun: the time of the first write that is not the lock's.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self.notes: list[Note] = []
        self.shard: Note | None = None
        self.begun: float | None = None
        self._file: BinaryIO = path.open("rb")
        self._rest = b""

    def update(self) -> None:
        """Read new lines."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            seconds, process, thread, phase, place = line.decode().split(" ")
            note = Note(float(seconds), int(process), int(thread), phase, place)
            if phase == DATA and (self.shard is None or self.shard.place != place):
                self.shard = note
            if self.begun is None and note.is_of_store:
                self.begun = note.seconds
            self.notes.append(note)

    def phase(self, process: int) -> str:
        """What a process is writing, or was when it died; a shard rather than what its other threads write."""
        last = {note.thread: note.phase for note in self.notes if note.process == process}
        return next((phase for phase in (COMMIT, DATA, METADATA) if phase in last.values()), NOTHING)
