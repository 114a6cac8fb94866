"""Writes files so that after a crash each is either whole or missing: under a temporary name, synced, then renamed.

tensorstore does the same, one file at a time; several at once need far fewer commits of the disk's journal.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

TEMPORARY = ".__lock"  # the suffix of the files that tensorstore is writing
_MAX_PIECES = 1024  # of one writev


def write_files(files: Iterable[tuple[Path, Sequence[memoryview]]]) -> None:
    """Write files, each from its pieces, replacing existing ones; all are durable when this returns.

    Raises:
        OSError: the disk refuses; files that were renamed by then are whole.
    """
    folders: set[Path] = set()
    with ExitStack() as open_files, ThreadPoolExecutor(1, "sync") as pool:  # syncs a file while the next is written
        written = []
        for path, pieces in files:
            folders |= _make_folders(path.parent)
            temporary, file = _write(path, pieces, open_files)
            written.append((path, temporary, pool.submit(os.fsync, file)))
        for path, temporary, synced in written:
            synced.result()
            temporary.replace(path)
    for folder in folders:
        _sync(folder)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that a killed writer of this file left; no other writer may be active."""
    for left in path.parent.glob(f"{escape(path.name)}*{TEMPORARY}"):
        left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; if the block succeeds, that file is synced and replaces `path`.

    Its mode follows the umask, also where a library puts a private file of its own in place of the temporary one.
    """
    partial = _temporary(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _make_folders(folder: Path) -> set[Path]:
    """Make a folder; returns it and the folders that have a new entry."""
    if folder.is_dir():
        return {folder}
    above = _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    return {folder, *above}


def _write(path: Path, pieces: Sequence[memoryview], open_files: ExitStack) -> tuple[Path, int]:
    """Write a temporary file; returns its name and descriptor. It is deleted in the end unless it was renamed."""
    temporary = _temporary(path)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    open_files.callback(_close, file, temporary)
    for start in range(0, len(pieces), _MAX_PIECES):
        _write_all(file, list(pieces[start : start + _MAX_PIECES]))
    return temporary, file


def _temporary(path: Path) -> Path:
    """A temporary name that no other writer of the same file uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")


def _write_all(file: int, pieces: list[memoryview]) -> None:
    while pieces:
        written = os.writev(file, pieces)
        while pieces and written >= pieces[0].nbytes:
            written -= pieces.pop(0).nbytes
        if written:
            pieces[0] = pieces[0][written:]


def _close(file: int, temporary: Path) -> None:
    os.close(file)
    with suppress(OSError):
        temporary.unlink()


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
