"""Processes that decode videos, so that no video can hang or crash the job: each has a time limit and may die.

Every worker has pipes of its own. (In the pools of pebble and of the standard library workers share one pipe and its
lock: one killed while it writes its answer takes the others with it, and a script without `if __name__ == "__main__"`
is run again in each.)
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from store.errors import JobError

_START_SECONDS = 120.0  # a loaded machine takes long to import numpy
_ANSWERS = 500  # after which a worker is replaced: what its libraries leak does not add up
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Ctrl-C reaches the workers too; they end at once and without a word, so that nobody waits for them.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path[:] = {path!r}
from extract.video.decode_process import serve
serve()
"""


class WorkerError(Exception):
    """A worker gave no answer: it died, or was ended at the time limit."""


class _DiedError(WorkerError):
    pass


class Answer(NamedTuple):
    header: Mapping[str, Any]
    frames: UInt8[np.ndarray, "frames height width 3"] | None


class Workers:
    """As many workers as there are cores, started at need. They end with the process that made them."""

    def __init__(self) -> None:
        self._all = [_Worker() for _ in range(os.cpu_count() or 1)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answer:
        """Wait for a worker, and for its answer `seconds` at most.

        Raises:
            WorkerError: it took longer, or two workers died of the request (one may be killed by chance).
            JobError: workers cannot be started, or were interrupted.
        """
        worker = self._idle.get()
        try:
            try:
                return worker.ask(request, seconds)
            except _DiedError:
                return worker.ask(request, seconds)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._all:
            worker.stop()


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = 0

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answer:
        if self._process is None or self._answers >= _ANSWERS:
            self._restart()
        assert self._process is not None
        self._answers += 1
        with self._limited(self._process, seconds):
            return _exchange(self._process, json.dumps({**request, "seconds": seconds}).encode() + b"\n")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # a request that it never read
                    pipe.close()  # type: ignore[union-attr]

    def _restart(self) -> None:
        self.stop()
        command = [sys.executable, "-c", _PROGRAM.format(path=sys.path)]
        environment = {**os.environ, **_ONE_THREAD}
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise JobError(f"a process that decodes videos cannot be started: {error}") from error
        self._answers = 0
        try:
            with self._limited(self._process, _START_SECONDS):
                _read_line(self._process)
        except WorkerError as error:
            raise JobError(f"a process that decodes videos did not start: {error}; see what it printed") from error

    @contextmanager
    def _limited(self, process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[None]:
        """Kill the process after `seconds`, which ends the wait for its answer. One that failed is not used again."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except _DiedError as error:
            self.stop()
            if expired.is_set():
                raise WorkerError(f"it took longer than {seconds:g} s") from error
            raise
        except BaseException:  # Ctrl-C: the answer would be taken for the next one's
            self.stop()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():  # just after the answer
            self.stop()


def _exchange(process: "subprocess.Popen[bytes]", request: bytes) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except OSError as error:
        raise _died(process) from error
    header = json.loads(_read_line(process))
    if "shape" not in header:
        return Answer(header, None)
    frames = np.empty(header["shape"], np.uint8)
    if process.stdout.readinto(frames.data.cast("B")) < frames.nbytes:  # type: ignore[attr-defined]
        raise _died(process)
    return Answer(header, frames)


def _read_line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise _died(process)
    return line


def _died(process: "subprocess.Popen[bytes]") -> Exception:
    status = process.wait()
    if status == -signal.SIGINT:
        return JobError("the decoding of videos was interrupted; start again to go on")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return _DiedError(f"the process that decoded it died ({how}), perhaps for want of memory")
