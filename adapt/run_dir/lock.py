"""One job at a time in a run directory: a lock of the operating system on a file there, which names its owner.

The system lets go of the lock when its owner ends, be it killed: there is no dead owner to recognize. Those who only
read the directory (`report`, `predict`) need no lock, since its files are replaced whole.
"""

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adapt.run_dir.files import make_run_dir
from store.errors import JobError, Note
from store.local.durable_files import TEMPORARY
from store.lock import describe_owner, this_process

_FILE = ".run.lock"
_MOST_BYTES = 64 << 10  # of an owner's description that is read
_LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_OF_ONE_JOB = (".", "adaptors", "checkpoints", "search")  # folders in which the job that holds the lock writes


@contextmanager
def hold_run_dir(run_dir: Path) -> Iterator[None]:
    """Make a run directory, and keep every other job out of it while the block runs.

    Raises:
        UserError: no folder can be made there.
        JobError: another job is at work in it.
    """
    make_run_dir(run_dir)
    path = run_dir / _FILE
    with ExitStack() as held:
        try:
            file = held.enter_context(open_locked(path, wait=False))
        except BlockingIOError as error:
            raise JobError(
                f"{run_dir} is in use by {_read_owner(path)}; wait until that job ends, or stop it, then run this one "
                "again, or choose another run_dir"
            ) from error
        held.callback(_describe_in, file, b"")
        _describe_in(file, json.dumps(this_process(), indent=1).encode())
        _remove_leftovers(run_dir)
        yield


@contextmanager
def open_locked(path: Path, wait: bool) -> Iterator[int]:
    """The descriptor of a file that no other process has in this way; where the system cannot lock it, with a note.

    Raises:
        JobError: the file cannot be opened.
        BlockingIOError: another process has it, and this one is not to wait.
    """
    try:  # no link is followed: what it leads to would be written to
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        raise JobError(
            f"the lock {path} cannot be opened ({error.strerror}); it must be a file that you may write"
        ) from error
    try:
        _lock(file, path, wait)
        yield file
    finally:
        os.close(file)  # which gives the lock back


def _lock(file: int, path: Path, wait: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _LOCKED:
            raise BlockingIOError(*error.args) from error
        message = f"{path} cannot be locked ({error.strerror}): see to it that no other job uses this run_dir"
        warnings.warn(message, Note, stacklevel=4)


def _describe_in(file: int, owner: bytes) -> None:
    """Words for others to read; the lock holds without them, also on a disk that is full."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, owner, 0)


def _read_owner(path: Path) -> str:
    try:
        with path.open("rb") as file:
            owner = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):  # it is just being written
        owner = {}
    return describe_owner(owner if isinstance(owner, dict) else {})


def _remove_leftovers(run_dir: Path) -> None:
    """What killed writers left; a report may be under way without the lock, and its file is left alone."""
    for folder in _OF_ONE_JOB:
        for left in (run_dir / folder).glob(f"*{TEMPORARY}"):
            if not left.name.startswith("report.html"):
                left.unlink(missing_ok=True)
