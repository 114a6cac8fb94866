"""Refuses links, FIFOs, sockets and devices in a store: below its root, a local store has folders and regular files.

A store may come from an untrusted source. A symbolic link in it would redirect reads, writes and deletions to another
place, and a FIFO would block a reader forever. Nothing here follows a link or opens a file. The root itself may be a
link, which the user has chosen.

Hard links are legal, since files are replaced by renaming, which does not change the other name's content. The
exception is a temporary file that a killed tensorstore left: tensorstore writes into it.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress

from store.io_errors import AccessError
from store.local.durable_files import TEMPORARY

_LINK = "a symbolic link"
_KINDS: dict[str, Callable[[int], bool]] = {
    _LINK: stat.S_ISLNK,
    "a FIFO": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class IrregularError(AccessError):
    """The error for a path that is neither a folder nor a regular file of the store."""

    def __init__(self, path: str, kind: str) -> None:
        link = kind.startswith(_LINK)
        super().__init__(
            f"{path} is {kind}; below its root a store has only folders and regular files, so that nothing outside "
            f"it is read, changed or deleted; {'replace it by a copy of its target, or ' if link else ''}"
            "remove it, then run the same command again",
            f"is {kind}",
        )
        self.path = path


def require_regular(root: str, key: str) -> int | None:
    """Refuse a key that is, or is below, something other than folders and regular files.

    Returns:
        its size in bytes; None where it is missing.

    Raises:
        IrregularError: names the path.
    """
    path, status = root, os.stat_result([0] * 10)
    for part in key.split("/"):
        if part in ("", ".", ".."):  # they lead out of the store
            raise IrregularError(f"{root}/{key}", "not a path within the store")
        path = f"{path}/{part}"
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if fault := _fault(path, status):
            raise fault
    return status.st_size


def walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder except folders; entries that are deleted in the meantime may be left out.

    Raises:
        OSError: a folder cannot be listed.
    """
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            entries = list(os.scandir(place))
        except FileNotFoundError:
            continue
        except PermissionError:
            if place == f"{folder}/lost+found":  # at the root of a file system; only root may list it
                continue
            raise
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                yield entry


def total_bytes(folder: str) -> int:
    """The size of all files below a folder.

    Raises:
        IrregularError: something there is neither a folder nor a regular file.
        OSError: a folder cannot be listed.
    """
    total = 0
    for entry in walk(folder):
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if fault := _fault(entry.path, status):
                raise fault
            total += status.st_size
    return total


def irregular(folder: str) -> Iterator[IrregularError]:
    """An error for each path below a folder that is neither a folder nor a regular file; raises as `walk`."""
    for entry in walk(folder):
        if not entry.is_file(follow_symlinks=False) or entry.name.endswith(TEMPORARY):
            with suppress(FileNotFoundError):
                if fault := _fault(entry.path, entry.stat(follow_symlinks=False)):
                    yield fault


def _fault(path: str, status: os.stat_result) -> IrregularError | None:
    """The error for a path; None for a regular file or a folder."""
    kind = next((name for name, is_kind in _KINDS.items() if is_kind(status.st_mode)), None)
    if kind == _LINK:
        with suppress(OSError):
            kind += f" to {os.readlink(path)!r}"  # noqa: PTH115 (Path would drop a slash at the end)
    elif kind is None and path.endswith(TEMPORARY) and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        kind = "left from a write that was killed, and has a second name (a hard link), through which it would change"
    return IrregularError(path, kind) if kind else None
