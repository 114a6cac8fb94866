"""Notes in a file what the processes of a job are writing, so that whoever kills one knows what was under way.

A line is `seconds process thread phase place`, on a clock that all processes share. A write within another one, such as
that of the lock before a shard's, goes by its own name until it is done. Workers of dask trace themselves where this
module is their preload: it imports nothing but what the job itself does.
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
    seconds: float
    process: int
    thread: int
    phase: str
    place: str

    @property
    def is_of_store(self) -> bool:
        """Whether this is the start of a write, and of more than the lock."""
        return self.phase != NOTHING and self.place != _LOCK_PLACE


def trace_writes(path: Path) -> None:
    """From now on, note what this process writes."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    thread = threading.local()

    def note(phase: str, place: str) -> None:
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        os.write(file, f"{now:.6f} {os.getpid()} {threading.get_native_id()} {phase} {place}\n".encode())

    def wrap(owner: type, name: str, phase: str, place_of: Callable[..., str]) -> None:
        call = getattr(owner, name)

        def noted(self: Any, *given: Any, **named: Any) -> Any:
            around = getattr(thread, "within", (NOTHING, "-"))
            thread.within = phase, place_of(self, *given)
            note(*thread.within)
            try:
                return call(self, *given, **named)
            finally:
                thread.within = around
                note(*around)

        setattr(owner, name, noted)

    def shard(writer: Any, split: str, number: int, *given: Any) -> str:
        return f"{writer._marks.value}{split}/{number}"

    wrap(StoreWriter, "write", DATA, shard)
    wrap(StoreWriter, "mark", COMMIT, shard)
    for name in ("write_bytes", "write_if"):
        wrap(KeyValueStore, name, METADATA, lambda folder, key, *given: str(key))
    wrap(KeyValueStore, "_remove", METADATA, lambda folder, keys: "deletion")


def dask_setup(worker: object) -> None:
    """See `distributed.worker.preload`."""
    trace_writes(Path(os.environ[FILE]))


class Trace:
    """What has been noted so far.

    Attributes:
        shard: whose data were begun last.
        begun: when the first write to more than the lock began.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self.notes: list[Note] = []
        self.shard: Note | None = None
        self.begun: float | None = None
        self._file: BinaryIO = path.open("rb")
        self._rest = b""

    def update(self) -> None:
        """Read on."""
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
        """What a process is writing, or was when it died; a shard before what its other threads may write."""
        last = {note.thread: note.phase for note in self.notes if note.process == process}
        return next((phase for phase in (COMMIT, DATA, METADATA) if phase in last.values()), NOTHING)
