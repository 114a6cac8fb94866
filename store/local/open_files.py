"""Keeps files open between reads, up to a limit."""

import os
import threading

Stamp = tuple[int, int, int]


class OpenFile:
    """A file that is open for reading until nothing refers to it anymore."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not block

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def stamp(self) -> Stamp:
        """Inode, size and time of the last change in ns; they differ after the file was written to or replaced.

        The time is the inode's (ctime), which a writer cannot set back.
        """
        status = os.fstat(self.fd)
        return status.st_ino, status.st_size, status.st_ctime_ns


class OpenFiles:
    """Open files by path, `limit` at most: the oldest ones are dropped, and closed when no thread reads from them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._files: dict[str, OpenFile] = {}

    def get(self, path: str) -> OpenFile:
        """The open file at a path; opens it if necessary."""
        return self._files.get(path) or self._open(path)

    def forget(self, path: str) -> None:
        """Drop a file, so that it is opened again next time."""
        with self._lock:
            self._files.pop(path, None)

    def _open(self, path: str) -> OpenFile:
        file = OpenFile(path)
        with self._lock:
            while len(self._files) >= self._limit:
                del self._files[next(iter(self._files))]
            self._files[path] = file
        return file
