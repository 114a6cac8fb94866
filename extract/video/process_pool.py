"""Runs the processes that decode videos, so that no video can hang or crash the job: each request has a time limit.

Every worker has its own pipes. `pebble.ProcessPool` (5.2), which has time limits too, is not used because its workers
share one pipe and its lock: after one was killed while it wrote its answer, the next request got no answer within 90
seconds, in 4 of 4 trials. It also imports the main script again in each worker: where that imports torch, the first
answer comes after 1.1 seconds, here after 0.2.
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

_START_SECONDS = 120.0  # on a busy machine, importing numpy takes long
_MAX_ANSWERS = 500  # of a worker, which is then replaced, so that memory leaks of its libraries do not add up
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Ctrl-C reaches the workers too: with the default handler they end at once, without a traceback.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path[:] = {path!r}
from extract.video.decode_process import serve
serve()
"""


class WorkerError(Exception):
    """A worker did not answer: it died, or was killed at the time limit."""


class _DiedError(WorkerError):
    pass


class Answer(NamedTuple):
    """A worker's answer; `frames` is None if there are none."""

    header: Mapping[str, Any]
    frames: UInt8[np.ndarray, "frames height width 3"] | None


class ProcessPool:
    """As many worker processes as there are cores, started when needed. They end with the process that made them."""

    def __init__(self) -> None:
        self._workers = [_WorkerProcess() for _ in range(os.cpu_count() or 1)]
        self._idle: queue.LifoQueue[_WorkerProcess] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answer:
        """Wait for an idle worker, send it the request and wait up to `seconds` for its answer.

        Raises:
            WorkerError: it took longer, or the request killed two workers (a single one may have died by chance).
            JobError: a worker cannot be started, or was interrupted.
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
        """Kill all workers."""
        for worker in self._workers:
            worker.kill()


class _WorkerProcess:
    """One process, used by one thread at a time; restarted when needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._n_answers = 0

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answer:
        if self._process is None or self._n_answers >= _MAX_ANSWERS:
            self._restart()
        assert self._process is not None
        self._n_answers += 1
        with self._time_limit(self._process, seconds):
            return _exchange(self._process, json.dumps({**request, "seconds": seconds}).encode() + b"\n")

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # closing flushes a request that the worker did not read
                    pipe.close()  # type: ignore[union-attr]

    def _restart(self) -> None:
        self.kill()
        command = [sys.executable, "-c", _PROGRAM.format(path=sys.path)]
        environment = {**os.environ, **_ONE_THREAD}
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise JobError(f"a process that decodes videos cannot be started: {error}") from error
        self._n_answers = 0
        try:
            with self._time_limit(self._process, _START_SECONDS):
                _read_line(self._process)
        except WorkerError as error:
            raise JobError(f"a process that decodes videos did not start: {error}; see its output above") from error

    @contextmanager
    def _time_limit(self, process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[None]:
        """Kill the process after `seconds`, which ends the wait for its answer; after any failure too."""
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
            self.kill()
            if expired.is_set():
                raise WorkerError(f"it took longer than {seconds:g} s") from error
            raise
        except BaseException:  # such as Ctrl-C: the pending answer must not be read as that of the next request
            self.kill()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():  # just after the answer
            self.kill()


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
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return _DiedError(f"the process that decoded it died ({cause}), perhaps because memory ran out")
