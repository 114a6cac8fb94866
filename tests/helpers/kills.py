"""Kills a job at a given position in the timeline of the same job when it ran uninterrupted.

Positions are measured in shards and the time within one, so that a slower or resumed job is killed at the right place.
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
_STUCK_SECONDS, _POLL_SECONDS, _WAIT_SECONDS = 900.0, 0.0002, 0.005


class StuckError(Exception):
    """A job, or one of its workers, does not end."""


@dataclass(frozen=True)
class Target:
    """The process to kill, and when: at a position between first and last write, or at the next write of a phase."""

    position: float
    phase: str | None = None
    victim: str = JOB


@dataclass(frozen=True)
class Kill:
    """A kill: what was being written, by which process, and at which position of the job.

    Attributes:
        orphan_seconds: how long the workers outlived their job; starting ones end after their start.
        late_seconds: how long after the kill they still began to write.
    """

    phase: str
    victim: str
    position: float
    orphan_seconds: float = 0.0
    late_seconds: float = 0.0


class Timeline:
    """The time at which each shard was begun, from the first write to the store to the last."""

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
        """How many shards have been begun at a position, and the seconds since the last of them."""
        moment = self._starts[0] + position * self._seconds
        begun = bisect_right(self._starts, moment) - 1
        return begun, moment - self._starts[begun]

    def begun(self, trace: Trace) -> int:
        """How many shards another run has begun; -1 before its first write."""
        if trace.shard:
            return self._number[trace.shard.place]
        return -1 if trace.begun is None else 0

    def position(self, trace: Trace, moment: float) -> float:
        """The position of another run at a moment."""
        begun = self.begun(trace)
        since = trace.shard.seconds if trace.shard else trace.begun or moment
        end = self._starts[begun + 1] if begun < self.n_shards else self._starts[0] + self._seconds
        return (min(self._starts[begun] + moment - since, end) - self._starts[0]) / self._seconds


def _lengths(notes: Sequence[Note], phase: str) -> list[float]:
    """The durations of a phase, without those of phases within it."""
    threads: dict[int, list[Note]] = {}
    for note in notes:
        threads.setdefault(note.thread, []).append(note)
    pairs = [pair for thread in threads.values() for pair in pairwise(thread)]
    return [after.seconds - note.seconds for note, after in pairs if note.phase == phase]


def kill_at(target: Target, run: Run, trace: Trace, timeline: Timeline, draw: random.Random) -> Kill | None:
    """Kill a run at a target; None if it ended before."""
    begun, seconds = timeline.at(target.position)
    if target.phase:
        seconds = draw.uniform(0, timeline.typical[target.phase])
    started = time.monotonic()
    while not run.has_ended():
        trace.update()
        victim = _victim(run, trace, target)
        if victim and timeline.begun(trace) >= begun and target.phase in (None, trace.phase(victim)):
            time.sleep(seconds)
            return _kill(victim, run, trace, timeline=timeline, target=target)
        if time.monotonic() - started > _STUCK_SECONDS:
            os.kill(run.process, signal.SIGKILL)
            raise StuckError(f"process {run.process} does not reach {target}; it wrote {trace.notes[-5:]}")
        time.sleep(_POLL_SECONDS)
    return None


def _victim(run: Run, trace: Trace, target: Target) -> int | None:
    if target.victim == JOB:
        return run.process
    return trace.shard.process if trace.shard else None


def _kill(victim: int, run: Run, trace: Trace, timeline: Timeline, target: Target) -> Kill | None:
    moment, workers = time.monotonic(), list[psutil.Process]()
    try:
        process = psutil.Process(victim)
        if target.victim == JOB:
            process.suspend()  # now; listing its workers takes milliseconds
            workers = process.children(recursive=True)
        process.kill()
    except psutil.NoSuchProcess:  # a worker, whose job has just ended
        return None
    wait_for_end([process])
    if target.victim == JOB:
        end = os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
        if end is None or end.si_status != signal.SIGKILL:  # it had ended before
            return None
        wait_for_end(workers)
    ended = time.monotonic()
    trace.update()
    kill = Kill(trace.phase(victim), target.victim, timeline.position(trace, moment))
    if target.victim == WORKER or not workers:
        return kill
    late = max((note.seconds for note in trace.notes if note.phase != NOTHING), default=moment) - moment
    return replace(kill, orphan_seconds=ended - moment, late_seconds=max(0.0, late))


def wait_for_end(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended (zombies count), and kill those that do not."""
    started = time.monotonic()
    while living := [process for process in processes if _lives(process)]:
        if time.monotonic() - started > _STUCK_SECONDS:
            for process in living:
                process.kill()
            raise StuckError(f"{living} should have ended, but have not for {_STUCK_SECONDS:.0f} s")
        time.sleep(_WAIT_SECONDS)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
