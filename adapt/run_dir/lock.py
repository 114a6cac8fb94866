"""Locks a run directory, so that only one job writes there at a time.

The lock is `flock` on a file that describes its owner. The operating system releases it when the process ends, also
when it is killed, so there are no stale locks. Commands that only read the directory (`report`, `predict`) need no
lock, since files are replaced atomically.
"""

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adapt.run_dir.files import make_folder
from store.errors import JobError, Note
from store.local.durable_files import TEMPORARY
from store.lock import describe_owner, this_process

_FILE = ".run.lock"
_MOST_BYTES = 64 << 10  # of an owner's description that is read
_LOCKED_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_FOLDERS = (
    ".",
    "adaptors",
    "checkpoints",
    "curves",
    "predictions",
    "search",
)  # where only the job that holds the lock writes


@contextmanager
def hold_run_dir(run_dir: Path) -> Iterator[None]:
    """Make a run directory, and hold its lock while the block runs.

    Raises:
        UserError: no folder can be made at this path.
        JobError: another job holds the lock.
    """
    make_folder(run_dir)
    path = run_dir / _FILE
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_locked(path, wait=False))
        except BlockingIOError as error:
            raise JobError(
                f"{run_dir} is in use by {_read_owner(path)}; wait until that job ends, or stop it, then run this one "
                "again, or choose another run_dir"
            ) from error
        stack.callback(_write_owner, file, b"")
        _write_owner(file, json.dumps(this_process(), indent=1).encode())
        _remove_leftovers(run_dir)
        yield


@contextmanager
def open_locked(path: Path, wait: bool) -> Iterator[int]:
    """Open a file with an exclusive lock; the lock is skipped with a note if the file system has none.

    Args:
        wait: wait for another process to release the lock.

    Yields:
        the file's descriptor.

    Raises:
        JobError: the file cannot be opened.
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:  # links are not followed, since the file is written to
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        raise JobError(
            f"the lock {path} cannot be opened ({error.strerror}); it must be a file that you may write"
        ) from error
    try:
        _lock(file, path, wait)
        yield file
    finally:
        os.close(file)  # this releases the lock


def _lock(file: int, path: Path, wait: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _LOCKED_BY_ANOTHER:
            raise BlockingIOError(*error.args) from error
        message = f"{path} cannot be locked ({error.strerror}): make sure that no other job uses this run_dir"
        warnings.warn(message, Note, stacklevel=4)


def _write_owner(file: int, owner: bytes) -> None:
    """Describe the owner, for the messages of other processes; the lock does not depend on it."""
    with suppress(OSError):  # such as a full disk
        os.ftruncate(file, 0)
        os.pwrite(file, owner, 0)


def _read_owner(path: Path) -> str:
    try:
        with path.open("rb") as file:
            owner = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):  # the owner may be writing it
        owner = {}
    return describe_owner(owner if isinstance(owner, dict) else {})


def _remove_leftovers(run_dir: Path) -> None:
    """Remove temporary files of killed processes, except the report's, which is written without the lock."""
    for folder in _FOLDERS:
        for leftover in (run_dir / folder).glob(f"*{TEMPORARY}"):
            if not leftover.name.startswith("report.html"):
                leftover.unlink(missing_ok=True)
