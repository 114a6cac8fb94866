"""Files that are whole and on the disk, or not there: written under another name, synced, and only then renamed.

tensorstore does the same for a file at a time; several at once need far fewer commits of the disk's journal.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

TEMPORARY = ".__lock"  # as tensorstore names what it is writing
_AT_ONCE = 1024  # pieces, of which no system takes more


def write_files(files: Iterable[tuple[Path, Sequence[memoryview]]]) -> None:
    """Write files whole, each from its pieces, in place of those that are there; all are durable when this returns.

    Raises:
        OSError: the disk refuses; files that have their name by then are whole.
    """
    folders: set[Path] = set()
    with ExitStack() as open_files, ThreadPoolExecutor(1, "sync") as pool:  # which syncs one while the next is written
        begun = []
        for path, pieces in files:
            folders |= _make_folders(path.parent)
            temporary, file = _write(path, pieces, open_files)
            begun.append((path, temporary, pool.submit(os.fsync, file)))
        for path, temporary, synced in begun:
            synced.result()
            temporary.replace(path)
    for folder in folders:
        _sync(folder)


def remove_leftovers(path: Path) -> None:
    """Remove what a writer of this file left that was killed; the caller must know that no other is at work on it."""
    for left in path.parent.glob(f"{escape(path.name)}*{TEMPORARY}"):
        left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where a library is to write a file, which takes the place of `path` once it is on the disk; or else is gone."""
    partial = _temporary(path)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _make_folders(folder: Path) -> set[Path]:
    """Make a folder; it, and whatever folders have a new entry for it."""
    if folder.is_dir():
        return {folder}
    above = _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    return {folder, *above}


def _write(path: Path, pieces: Sequence[memoryview], open_files: ExitStack) -> tuple[Path, int]:
    """The name and descriptor of a file that holds the pieces, and is gone in the end unless it is renamed."""
    temporary = _temporary(path)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    open_files.callback(_close, file, temporary)
    for start in range(0, len(pieces), _AT_ONCE):
        _write_all(file, list(pieces[start : start + _AT_ONCE]))
    return temporary, file


def _temporary(path: Path) -> Path:
    """A writer's own name for what it is writing, whoever else writes the same file."""
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
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
