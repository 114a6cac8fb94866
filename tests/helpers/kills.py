"""Kills a job at a given point of its course, which is that of the same job when nobody interrupted it.

The course is kept by shards, not by the clock alone: a job that is slower today, or resumed, is hit where it was to be.
"""

import os
import random
import signal
import statistics
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import psutil
from resume_worker import Run
from write_trace import COMMIT, DATA, METADATA, NOTHING, Note, Trace

WRITING = (DATA, COMMIT, METADATA)
JOB, WORKER = "job", "worker"
_STUCK_SECONDS, _POLL_SECONDS, _REST_SECONDS = 900.0, 0.0002, 0.005


class StuckError(Exception):
    """A job that goes on for ever, or leaves workers that do."""


@dataclass(frozen=True)
class Aim:
    """Whom to kill, and when: at a position between the first write and the last, or at the next write of a kind."""

    position: float
    phase: str | None = None
    victim: str = JOB


@dataclass(frozen=True)
class Death:
    """What was being written, and where the job was.

    Attributes:
        orphan_seconds: how long its workers outlived it; those that were still starting end when they have started.
        late_seconds: how long after it they still began to write.
    """

    phase: str
    victim: str
    position: float
    orphan_seconds: float = 0.0
    late_seconds: float = 0.0


class Course:
    """When each shard was begun, from the first write to the store until the last one."""

    def __init__(self, trace: Trace) -> None:
        notes = [note for note in trace.notes if note.is_of_store]
        data = [note for note in notes if note.phase == DATA]
        self._number = {place: k for k, place in enumerate(dict.fromkeys(note.place for note in data), start=1)}
        first = {note.place: note.seconds for note in reversed(data)}
        self._starts = [notes[0].seconds, *(first[place] for place in self._number)]
        self._seconds = trace.notes[-1].seconds - self._starts[0]
        self.n_shards = len(self._number)
        self.typical = {phase: statistics.median(_lengths(trace.notes, phase)) for phase in WRITING}

    def at(self, position: float) -> tuple[int, float]:
        """How many shards have been begun, and the seconds since the last of them."""
        moment = self._starts[0] + position * self._seconds
        begun = bisect_right(self._starts, moment) - 1
        return begun, moment - self._starts[begun]

    def begun(self, trace: Trace) -> int:
        """How many shards another run has come to; -1 before its first write."""
        if trace.shard:
            return self._number[trace.shard.place]
        return -1 if trace.begun is None else 0

    def position(self, trace: Trace, moment: float) -> float:
        """Where another run was."""
        begun = self.begun(trace)
        since = trace.shard.seconds if trace.shard else trace.begun or moment
        end = self._starts[begun + 1] if begun < self.n_shards else self._starts[0] + self._seconds
        return (min(self._starts[begun] + moment - since, end) - self._starts[0]) / self._seconds


def _lengths(notes: Sequence[Note], phase: str) -> list[float]:
    """Of the stretches in which a thread was writing this and nothing within it."""
    threads: dict[int, list[Note]] = {}
    for note in notes:
        threads.setdefault(note.thread, []).append(note)
    pairs = [pair for thread in threads.values() for pair in pairwise(thread)]
    return [after.seconds - note.seconds for note, after in pairs if note.phase == phase]


def strike(run: Run, trace: Trace, course: Course, aim: Aim, draw: random.Random) -> Death | None:
    """Kill a run as aimed; None where it ended before."""
    begun, seconds = course.at(aim.position)
    if aim.phase:
        seconds = draw.uniform(0, course.typical[aim.phase])
    started = time.monotonic()
    while not run.has_ended():
        trace.update()
        victim = _victim(run, trace, aim)
        if victim and course.begun(trace) >= begun and aim.phase in (None, trace.phase(victim)):
            time.sleep(seconds)
            return _kill(run, victim, trace, course, aim)
        if time.monotonic() - started > _STUCK_SECONDS:
            os.kill(run.process, signal.SIGKILL)
            raise StuckError(f"process {run.process} does not come to {aim}; it noted {trace.notes[-5:]}")
        time.sleep(_POLL_SECONDS)
    return None


def _victim(run: Run, trace: Trace, aim: Aim) -> int | None:
    if aim.victim == JOB:
        return run.process
    return trace.shard.process if trace.shard else None


def _kill(run: Run, victim: int, trace: Trace, course: Course, aim: Aim) -> Death | None:
    moment, workers = time.monotonic(), list[psutil.Process]()
    try:
        target = psutil.Process(victim)
        if aim.victim == JOB:
            target.suspend()  # at this instant; to look for its workers takes milliseconds
            workers = target.children(recursive=True)
        target.kill()
    except psutil.NoSuchProcess:  # a worker, whose job has just ended
        return None
    wait_for_end([target])
    if aim.victim == JOB:
        end = os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
        if end is None or end.si_status != signal.SIGKILL:  # it had come to its end by itself
            return None
        wait_for_end(workers)
    ended = time.monotonic()
    trace.update()
    death = Death(trace.phase(victim), aim.victim, course.position(trace, moment))
    if aim.victim == WORKER or not workers:
        return death
    late = max((note.seconds for note in trace.notes if note.phase != NOTHING), default=moment) - moment
    return replace(death, orphan_seconds=ended - moment, late_seconds=max(0.0, late))


def wait_for_end(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended, zombies included, and end those that stand still."""
    started = time.monotonic()
    while living := [process for process in processes if _lives(process)]:
        if time.monotonic() - started > _STUCK_SECONDS:
            for process in living:
                process.kill()
            raise StuckError(f"{living} should have ended, and have not for {_STUCK_SECONDS:.0f} s")
        time.sleep(_REST_SECONDS)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
