"""One job at a time on a store: a lock that names its owner, and that a dead owner does not keep.

The lock is a group of its own below `_log`, so that any Zarr reader sees a node like the others. All writes to it are
conditional on the generation last seen, on a folder as on an object store: of two that reach for it, one gets it.

Whether an owner still lives is never told by comparing clocks. On the owner's own machine the process itself is looked
for; from elsewhere its heartbeat is watched, which rewrites the lock every few seconds. An owner that stands still for
longer than others wait loses the lock, and `check` tells it so. What remains open is a process that is frozen between
`check` and the write that follows: no store can rule that out, and the digest that `verify` compares would show it.
"""

import json
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from threading import Lock as Mutex
from typing import Any, Protocol, runtime_checkable

import psutil

from store.address import local_path
from store.errors import JobError
from store.kvstore import LOCK, KeyValueStore
from store.zarr_metadata import CHECKSUM, document_checksum

BEAT_SECONDS, PATIENCE_SECONDS = 10.0, 60.0
_KEY = f"{LOCK}/zarr.json"
_POLLS_A_BEAT = 5
_START_TOLERANCE = 2.0  # seconds by which the operating system's answers on a process' start may differ


@runtime_checkable
class Guard(Protocol):
    """What tells a writer whether it still may write."""

    def check(self) -> None:
        """Raise JobError where the store is another job's by now."""
        ...


@contextmanager
def hold(
    folder: KeyValueStore, beat_seconds: float = BEAT_SECONDS, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator["Lock"]:
    """Keep every other job off a store while the block runs.

    Args:
        beat_seconds: how often the owner shows that it lives.
        patience_seconds: how long a lock from elsewhere must stand still until it is taken over; several beats.

    Raises:
        JobError: another job is at work on the store, or the disk refuses; or there is a link, a FIFO or the like in
            the store (regular.py).
    """
    folder.require_all_regular()
    lock = Lock(folder, beat_seconds, patience_seconds)
    lock.acquire()
    folder.stay_on_disk()
    ended = Event()
    heart = Thread(target=lock.beat_until, args=(ended,), name="lock", daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        try:
            ended.set()
            heart.join()
        finally:
            lock.release()


def remove_dead(folder: KeyValueStore) -> None:
    """Remove the lock of a job that was killed when nothing but this was left to do; others are left alone."""
    with suppress(JobError):  # of a store that nobody is to write
        owner, generation = _read(folder)
        if owner is not None and owner.get("machine") == _machine() and _process_lives(owner) is False:
            _delete(folder, generation)


class Lock:
    """A store's lock, seen from one job; threads may share it."""

    def __init__(self, folder: KeyValueStore, beat_seconds: float, patience_seconds: float) -> None:
        self._folder, self._beat_seconds, self._patience_seconds = folder, beat_seconds, patience_seconds
        self._owner: dict[str, Any] = this_process()
        self._beats, self._generation, self._mutex, self._released = 0, b"", Mutex(), False

    @property
    def id(self) -> str:
        """Names this owner among all others; workers give it to their `Watch`."""
        return str(self._owner["id"])

    def acquire(self) -> None:
        """Take the lock where it is free or its owner is dead."""
        while True:
            owner, self._generation = _read(self._folder)
            if owner is not None and owner.get("id") == self.id:  # written, though the answer was lost
                return
            if owner is not None and self._lives(owner):
                raise JobError(
                    f"{self._folder.place} is in use by {describe_owner(owner)}; wait until that job ends, or stop it, "
                    "then run this one again"
                )
            if self._write():  # else another was faster: look again
                return

    def check(self) -> None:
        """Make sure that the lock is still ours; it counts as a heartbeat.

        Raises:
            JobError: another job took it over, or the disk refuses.
        """
        with self._mutex:
            if self._released:
                raise JobError(f"this job has given {self._folder.place} back; it writes nothing more")
            if self._write():
                return
            owner, generation = _read(self._folder)
            if owner is not None and owner.get("id") == self.id:  # written, though the answer was lost
                self._generation = generation
                return
        raise JobError(
            f"this job lost {self._folder.place} to {describe_owner(owner or {})}, because it stood still for too "
            "long; it stops before it writes anything more; what is committed is kept"
        )

    def beat_until(self, ended: Event) -> None:
        """Renew the lock again and again; what goes wrong is for `check` to report."""
        while not ended.wait(self._beat_seconds):
            with suppress(JobError):
                self.check()

    def release(self) -> None:
        """Give the lock back, unless it is another's by now."""
        with (
            self._mutex,
            suppress(JobError),
        ):  # a disk that refuses now refuses the job's own writes, or the job is done
            self._released = True
            _delete(self._folder, self._generation)

    def _lives(self, owner: Mapping[str, Any]) -> bool:
        """Whether the owner of the lock just read is at work, or may be."""
        lives = _process_lives(owner) if owner.get("machine") == self._owner["machine"] else None
        if lives is not None:
            return lives
        deadline = time.monotonic() + self._patience_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / _POLLS_A_BEAT)
            now, generation = _read(self._folder)
            if generation != self._generation:
                return now is not None
        return False

    def _write(self) -> bool:
        """Write the lock if it is as it was last seen."""
        self._beats += 1
        attributes = {**self._owner, "beats": self._beats}
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        attributes[CHECKSUM] = document_checksum(document)
        generation = self._folder.write_if(_KEY, json.dumps(document, indent=1).encode(), self._generation)
        if generation is not None:
            self._generation = generation
        return generation is not None


class Watch:
    """A store's lock, seen from a worker of the job that holds it: it only looks."""

    def __init__(self, folder: KeyValueStore, owner_id: str) -> None:
        self._folder, self._owner_id = folder, owner_id

    def check(self) -> None:
        """Make sure that the lock is still our job's.

        Raises:
            JobError: the job ended, or another took the store over; or the disk refuses.
        """
        owner, _ = _read(self._folder)
        if owner is None or owner.get("id") != self._owner_id:
            now = "nobody" if owner is None else describe_owner(owner)
            raise JobError(
                f"the job that this worker belongs to has lost {self._folder.place} to {now}; it writes nothing"
            )


def read_owner(folder: KeyValueStore) -> str | None:
    """Who holds a store, in words; None where nobody does."""
    attributes = folder.read_group(LOCK)
    return None if attributes is None else describe_owner(attributes)


def _read(folder: KeyValueStore) -> tuple[dict[str, Any] | None, bytes]:
    """The owner, empty where it cannot be made out and None where the lock is free; and the lock's generation."""
    content, generation = folder.read_stamped(_KEY)
    if content is None:
        return None, generation
    try:
        owner = json.loads(content)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        owner = {}
    return owner if isinstance(owner, dict) else {}, generation


def _delete(folder: KeyValueStore, generation: bytes) -> None:
    """Delete the lock if it still is of that generation, and the folders that are empty without it."""
    folder.write_if(_KEY, None, generation)
    if path := local_path(folder.url):  # empty folders would puzzle Zarr readers
        with suppress(OSError):
            for empty in (path / LOCK, (path / LOCK).parent, path):
                empty.rmdir()


def this_process() -> dict[str, Any]:
    """What an owner writes of itself, by which others know it again."""
    return {
        "id": uuid.uuid4().hex,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "process_started": psutil.Process().create_time(),
    }


def _machine() -> str:
    """Equal only where two processes see each other by number: same machine, same boot, same container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = boot.read_text().strip() if boot.exists() else f"{uuid.getnode():x}"
    return f"{socket.gethostname()} {known} {namespace.readlink() if namespace.is_symlink() else ''}".strip()


def _process_lives(owner: Mapping[str, Any]) -> bool | None:
    """Whether a process of this machine runs; None where its number may be another's by now."""
    try:
        process = psutil.Process(int(owner["process"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return True if abs(process.create_time() - float(owner["process_started"])) < _START_TOLERANCE else None
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return None


def describe_owner(owner: Mapping[str, Any]) -> str:
    """Command, process, host and time of an owner, for a message."""
    if not {"command", "process", "host", "since"} <= set(owner):
        return "another job"
    return f"`{owner['command']}` (process {owner['process']} on {owner['host']}, since {owner['since']})"
