"""Below its root, a store in a local folder consists of folders and regular files.

Stores come from strangers too. A symbolic link in one would lead what is read, written or deleted to another place, and
a FIFO would make a reader wait for ever. Nothing here follows a link or opens a file. The root itself may be a link:
that one the user has chosen.

Hard links are legal, since files are replaced by renaming, which leaves their other names alone. Only what tensorstore
left of a write that was killed is written into as it is.
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
    """Something at `path` that is neither a folder nor a regular file of the store's own."""

    def __init__(self, path: str, kind: str) -> None:
        link = kind.startswith(_LINK)
        super().__init__(
            f"{path} is {kind}; below its root a store holds folders and regular files alone, so that nothing outside "
            f"it is read, changed or deleted; {'put a copy of what it leads to in its place, or ' if link else ''}"
            "remove it, then run the same command again",
            f"is {kind}",
        )
        self.path = path


def require_regular(root: str, key: str) -> int | None:
    """Refuse a key that is, or lies below, anything but folders and regular files; its size, None where it is missing.

    Raises:
        IrregularError: names what is in the way.
    """
    path, found = root, os.stat_result([0] * 10)
    for part in key.split("/"):
        if part in ("", ".", ".."):  # which would lead out of the store
            raise IrregularError(f"{root}/{key}", "no place within the store")
        path = f"{path}/{part}"
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if fault := _fault(path, found):
            raise fault
    return found.st_size


def walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder but folders. What is deleted meanwhile may be left out.

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
            if place == f"{folder}/lost+found":  # of a disk that is all the store's: nobody but root may list it
                continue
            raise
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                yield entry


def total_bytes(folder: str) -> int:
    """Of all files below a folder.

    Raises:
        IrregularError: something there is neither folder nor regular file.
        OSError: a folder cannot be listed.
    """
    total = 0
    for entry in walk(folder):
        with suppress(FileNotFoundError):
            found = entry.stat(follow_symlinks=False)
            if fault := _fault(entry.path, found):
                raise fault
            total += found.st_size
    return total


def irregular(folder: str) -> Iterator[IrregularError]:
    """A refusal for each thing below a folder that is neither folder nor regular file; errors as of `walk`."""
    for entry in walk(folder):
        if not entry.is_file(follow_symlinks=False) or entry.name.endswith(TEMPORARY):
            with suppress(FileNotFoundError):
                if fault := _fault(entry.path, entry.stat(follow_symlinks=False)):
                    yield fault


def _fault(path: str, found: os.stat_result) -> IrregularError | None:
    """What is wrong with a file or folder."""
    kind = next((name for name, is_one in _KINDS.items() if is_one(found.st_mode)), None)
    if kind == _LINK:
        with suppress(OSError):
            kind += f" to {os.readlink(path)!r}"  # noqa: PTH115 (Path would drop a slash at the end)
    elif kind is None and path.endswith(TEMPORARY) and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        kind = "left from a write that was killed, and has a second name (a hard link), through which it would change"
    return IrregularError(path, kind) if kind else None
