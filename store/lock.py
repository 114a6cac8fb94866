"""Locks a store, so that one job at a time writes to it; the lock names its owner.

The lock is the group `_log/lock`, which any Zarr reader sees as a node like the others. Writes to it are conditional on
the generation last seen, in a folder and in an object store: of two jobs that try to acquire it, one succeeds.

An owner whose process is dead loses the lock. Clocks are never compared: on the owner's machine its process is looked
up; from another machine its heartbeat is watched, which rewrites the lock every few seconds. An owner that is frozen
for longer than others wait loses the lock too, and its next `check` raises an error. One case remains: a process that
is frozen between `check` and the write that follows. `verify` then finds shards that do not fit their digests.
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
_START_TOLERANCE = 2.0  # seconds; the system's answers about a process' start differ by a little


@runtime_checkable
class Guard(Protocol):
    """A lock, or a view of one, that a writer checks before each write."""

    def check(self) -> None:
        """Raise JobError if the lock is lost to another job."""
        ...


@contextmanager
def hold(
    kvstore: KeyValueStore, beat_seconds: float = BEAT_SECONDS, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator["Lock"]:
    """Hold the lock of a store while the block runs; its files are checked first, so that a refusal leaves no lock.

    Args:
        beat_seconds: time between heartbeats.
        patience_seconds: time without heartbeat until a lock of another machine is taken over; several beats.

    Raises:
        JobError: another job holds the lock, or the disk refuses; or the store has a link, a FIFO or the like
            (see `store.local.regular_files`).
    """
    kvstore.require_all_regular()
    lock = Lock(kvstore, beat_seconds, patience_seconds)
    lock.acquire()
    kvstore.stay_on_disk()
    ended = Event()
    heartbeat = Thread(target=lock.beat_until, args=(ended,), name="lock", daemon=True)
    heartbeat.start()
    try:
        yield lock
    finally:
        try:
            ended.set()
            heartbeat.join()
        finally:
            lock.release()


def remove_dead(kvstore: KeyValueStore) -> None:
    """Remove the lock of a killed job of this machine; a lock whose owner may be alive is kept."""
    with suppress(JobError):  # the store may be read-only
        owner, generation = _read(kvstore)
        if owner is not None and owner.get("machine") == _machine() and _is_alive(owner) is False:
            _delete(kvstore, generation)


class Lock:
    """The lock of a store, for the job that holds it; threads may share it."""

    def __init__(self, kvstore: KeyValueStore, beat_seconds: float, patience_seconds: float) -> None:
        self._kvstore, self._beat_seconds, self._patience_seconds = kvstore, beat_seconds, patience_seconds
        self._owner: dict[str, Any] = this_process()
        self._beats, self._generation, self._mutex, self._released = 0, b"", Mutex(), False

    @property
    def id(self) -> str:
        """A unique name of this owner, for the `Watch` of its workers."""
        return str(self._owner["id"])

    def acquire(self) -> None:
        """Take the lock if it is free or its owner is dead.

        Raises:
            JobError: another job holds it.
        """
        while True:
            owner, self._generation = _read(self._kvstore)
            if owner is not None and owner.get("id") == self.id:  # written, although the response was lost
                return
            if owner is not None and self._may_be_alive(owner):
                raise JobError(
                    f"{self._kvstore.place} is in use by {describe_owner(owner)}; wait until that job ends, or stop "
                    "it, then run this one again"
                )
            if self._write():  # else another job was faster: read it again
                return

    def check(self) -> None:
        """Make sure that this job still holds the lock; this is a heartbeat too.

        Raises:
            JobError: another job took it over, or the disk refuses.
        """
        with self._mutex:
            if self._released:
                raise JobError(f"this job has released {self._kvstore.place}; it writes nothing more")
            if self._write():
                return
            owner, generation = _read(self._kvstore)
            if owner is not None and owner.get("id") == self.id:  # written, although the response was lost
                self._generation = generation
                return
        raise JobError(
            f"this job lost {self._kvstore.place} to {describe_owner(owner or {})}, because it was frozen for too "
            "long; it stops before it writes anything more; what is committed is kept"
        )

    def beat_until(self, ended: Event) -> None:
        """Renew the lock until the event is set; the next `check` reports failures."""
        while not ended.wait(self._beat_seconds):
            with suppress(JobError):
                self.check()

    def release(self) -> None:
        """Release the lock, unless another job took it over."""
        with self._mutex, suppress(JobError):  # the job's own writes report a disk that refuses
            self._released = True
            _delete(self._kvstore, self._generation)

    def _may_be_alive(self, owner: Mapping[str, Any]) -> bool:
        """Whether the owner of the lock just read is alive, or may be."""
        alive = _is_alive(owner) if owner.get("machine") == self._owner["machine"] else None
        if alive is not None:
            return alive
        # unknown: watch its heartbeat
        deadline = time.monotonic() + self._patience_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / _POLLS_A_BEAT)
            current, generation = _read(self._kvstore)
            if generation != self._generation:
                return current is not None
        return False

    def _write(self) -> bool:
        """Write the lock if its generation is the one last seen."""
        self._beats += 1
        attributes = {**self._owner, "beats": self._beats}
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        attributes[CHECKSUM] = document_checksum(document)
        generation = self._kvstore.write_if(_KEY, json.dumps(document, indent=1).encode(), self._generation)
        if generation is not None:
            self._generation = generation
        return generation is not None


class Watch:
    """The lock of a store, for a worker of the job that holds it: it is only read."""

    def __init__(self, kvstore: KeyValueStore, owner_id: str) -> None:
        self._kvstore, self._owner_id = kvstore, owner_id

    def check(self) -> None:
        """Make sure that the worker's job still holds the lock.

        Raises:
            JobError: the job ended, or another took the lock over; or the disk refuses.
        """
        owner, _ = _read(self._kvstore)
        if owner is None or owner.get("id") != self._owner_id:
            holder = "nobody" if owner is None else describe_owner(owner)
            raise JobError(
                f"the job that this worker belongs to has lost {self._kvstore.place} to {holder}; it writes nothing"
            )


def read_owner(kvstore: KeyValueStore) -> str | None:
    """The owner of a store's lock, for a message; None if it is free."""
    attributes = kvstore.read_group(LOCK)
    return None if attributes is None else describe_owner(attributes)


def _read(kvstore: KeyValueStore) -> tuple[dict[str, Any] | None, bytes]:
    """The owner (empty if it cannot be read, None if the lock is free), and the lock's generation."""
    content, generation = kvstore.read_with_generation(_KEY)
    if content is None:
        return None, generation
    try:
        owner = json.loads(content)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        owner = {}
    return owner if isinstance(owner, dict) else {}, generation


def _delete(kvstore: KeyValueStore, generation: bytes) -> None:
    """Delete the lock if it still has that generation, and the folders that are empty without it."""
    kvstore.write_if(_KEY, None, generation)
    if path := local_path(kvstore.url):  # empty folders would puzzle Zarr readers
        with suppress(OSError):
            for empty in (path / LOCK, (path / LOCK).parent, path):
                empty.rmdir()


def this_process() -> dict[str, Any]:
    """The description of this process that a lock holds."""
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
    """Equal for two processes only if they see each other's process number: same machine, same boot, same container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = boot.read_text().strip() if boot.exists() else f"{uuid.getnode():x}"
    return f"{socket.gethostname()} {known} {namespace.readlink() if namespace.is_symlink() else ''}".strip()


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether a process of this machine runs; None if its number may have been reused."""
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
