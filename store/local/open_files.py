"""Open files, of which a process may have only so many."""

import os
import threading

Stamp = tuple[int, int, int]


class OpenFile:
    """A file, open for reading until nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # of a FIFO, no waiting

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def stamp(self) -> Stamp:
        """Inode, size and time of the last change, in ns: another one where the file was written to, or replaced.

        The time is that of the inode, which also changes where a writer sets the time of modification back.
        """
        found = os.fstat(self.fd)
        return found.st_ino, found.st_size, found.st_ctime_ns


class OpenFiles:
    """Files by path, `limit` at most: those opened first make room, and are closed once nobody reads from them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._files: dict[str, OpenFile] = {}

    def get(self, path: str) -> OpenFile:
        """A file, opened where it is not yet."""
        return self._files.get(path) or self._open(path)

    def forget(self, path: str) -> None:
        """Open it anew next time."""
        with self._lock:
            self._files.pop(path, None)

    def _open(self, path: str) -> OpenFile:
        file = OpenFile(path)
        with self._lock:
            while len(self._files) >= self._limit:
                del self._files[next(iter(self._files))]
            self._files[path] = file
        return file
