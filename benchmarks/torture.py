"""Kills extractions, resumes them, and compares the stores with one whose extraction was not interrupted.

    python -m benchmarks.torture --kills 200
    python -m benchmarks.torture --kills 200 --power-loss

The job of each store, of 42 shards or more, is killed several times, uniformly between its first and its last write,
and resumed each time. The complete store must then equal the uninterrupted one, byte for byte (except `_log`, which
has times). The last kills are aimed, so that at least a tenth of all hit the writing of data, of commit marks and of
metadata each. A tenth hit jobs with two worker processes (the job or a worker), and a tenth a store that grows by
samples and layers. With `--power-loss`, files that are not committed when a job is killed are truncated, zeroed or
deleted.

Prints kills by what was being written, by the process killed and by tenth of the job, resumes and seconds, and last a
line with kills and differences; the exit status is 0 if there are no differences. 200 kills take 5 to 10 minutes on two
cores.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import numpy as np
import psutil
from kills import JOB, WORKER, WRITING, Kill, Target, Timeline, kill_at, wait_for_end
from PIL import Image
from power_loss import lose_power
from resume_worker import Job, Run, load_tiny
from small_store import contents
from write_trace import NOTHING, Trace

from benchmarks.record import add_record_options, machine

IMAGES = {"train": 59, "test": 23}  # the last shard of each is part-filled
MAX_KILLS = {"one process": 8, "two workers": 2, "growth": 8}  # of the job of one store
SHM = Path("/dev/shm")
ORPHAN_SECONDS = 60.0  # workers may outlive their job by so much: a starting one imports torch before it checks


class Scenario:
    """One kind of job, the store that it makes uninterrupted, and the kills and differences so far."""

    def __init__(self, name: str, job: Job, folder: Path, draw: random.Random, power_loss: bool) -> None:
        self.name, self._job, self._folder, self._draw, self._power_loss = name, job, folder, draw, power_loss
        self.kills: list[Kill] = []
        self.stores = self.resumes = self.damaged = self.differences = 0
        folder.mkdir(parents=True)

    def prepare(self, base: Path | None = None) -> None:
        """Run the job uninterrupted; `base` is the store that it grows, if any."""
        self._base = base
        run, trace = self._start(self._new_store(), replace(self._job, workers=1))
        self._end(run)
        trace.update()
        self._whole, self.timeline = contents(self._folder / "c.zarr"), Timeline(trace)

    def kill(self, phases: Sequence[str | None]) -> None:
        """Kill the job of one store once for each phase (None for any), and compare the store."""
        store, positions = self._new_store(), sorted(self._draw.random() for _ in phases)
        run, trace = self._start(store, self._job)
        for phase, position in zip(phases, positions, strict=True):
            victim = self._draw.choice((JOB, WORKER)) if self._job.workers > 1 else JOB
            target = Target(position, phase, victim)
            kill = kill_at(target, run, trace, timeline=self.timeline, draw=self._draw)
            if kill is None:
                break
            self.kills.append(kill)
            if victim == JOB:
                run.finish()
                self.damaged += len(lose_power(store, self._draw)) if self._power_loss else 0
                run, trace = self._start(store, self._job)
                self.resumes += 1
        self._end(run)
        self._compare(contents(store))

    def _new_store(self) -> Path:
        store = self._folder / "c.zarr"
        shutil.rmtree(store, ignore_errors=True)
        if self._base:
            shutil.copytree(self._base, store)
        return store

    def _start(self, store: Path, job: Job) -> tuple[Run, Trace]:
        path = self._folder / "trace"
        path.unlink(missing_ok=True)
        trace = Trace(path)
        return job.start(store, path), trace

    def _end(self, run: Run) -> None:
        wait_for_end([psutil.Process(run.process)])
        status, _ = run.finish()
        if status:
            print(f"{self.name}: a run that was not killed ended with status {status}")
            self.differences += 1

    def _compare(self, found: dict[str, bytes]) -> None:
        self.stores += 1
        names = sorted(name for name in found.keys() | self._whole if found.get(name) != self._whole.get(name))
        for name in names:
            difference = "missing" if name not in found else "other bytes" if name in self._whole else "too many"
            print(f"{self.name}, store {self.stores}: {name}: {difference}")
        self.differences += len(names)


def draw_images(root: Path) -> None:
    """Draw noise, in two classes."""
    draw = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for number in range(count):
            folder = root / split / ("blue", "red")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (32, 40, 3), np.uint8)).save(folder / f"{number:02}.png")


def prepare(folder: Path, draw: random.Random, power_loss: bool) -> list[Scenario]:
    """The three scenarios, each with its uninterrupted store."""
    images, few = folder / "images", folder / "few"
    draw_images(images)
    shutil.copytree(images, few, ignore=shutil.ignore_patterns("*1.png", "*4.png", "*8.png"))
    job = Job(images, "int8", load_tiny())
    kinds = {"one process": job, "two workers": replace(job, workers=2), "growth": job}
    scenarios = [Scenario(name, kind, folder / name, draw=draw, power_loss=power_loss) for name, kind in kinds.items()]
    base = folder / "base.zarr"
    if replace(job, images=few, layers=[1]).start(base).finish()[0]:
        raise SystemExit("the store that is to grow could not be made")
    for scenario in scenarios:
        scenario.prepare(base if scenario.name == "growth" else None)
    return scenarios


def kill_all(scenarios: Sequence[Scenario], kills: int, worker_kills: int, growth_kills: int) -> None:
    """Kill jobs of all scenarios; those of one process come last, aimed at phases that were hit too rarely."""
    first, *others = scenarios
    for scenario, wanted in zip(others, (worker_kills, growth_kills), strict=True):
        while (left := wanted - len(scenario.kills)) > 0:
            scenario.kill([None] * min(left, MAX_KILLS[scenario.name]))
            show(scenarios)
    while phases := wanted_phases([kill for scenario in scenarios for kill in scenario.kills], kills):
        first.kill(phases[: MAX_KILLS[first.name]])
        show(scenarios)


def wanted_phases(done: Sequence[Kill], kills: int) -> list[str | None]:
    """The phases of the next kills: any (None) for the first half, then those hit too rarely, then any again."""
    hits = Counter(kill.phase for kill in done)
    lacking: list[str | None] = [phase for phase in WRITING for _ in range(kills // 10 - hits[phase])]
    return [None] * (kills // 2 - len(done)) or lacking or [None] * (kills - len(done))


def show(scenarios: Sequence[Scenario]) -> None:
    """Show the number of kills so far, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{sum(len(scenario.kills) for scenario in scenarios)} kills", end="", file=sys.stderr)


def figures(scenarios: Sequence[Scenario], seconds: float) -> dict[str, Any]:
    """The figures that are printed, and saved as JSON."""
    kills = [kill for scenario in scenarios for kill in scenario.kills]
    phases, tenths = Counter(kill.phase for kill in kills), Counter(int(10 * kill.position) for kill in kills)
    victims = Counter(f"{scenario.name}: {kill.victim}" for scenario in scenarios for kill in scenario.kills)
    return {
        "kills": len(kills),
        "kills_by_phase": {phase: phases[phase] for phase in (*WRITING, NOTHING)},
        "kills_by_victim": dict(sorted(victims.items())),
        "kills_by_tenth": [tenths[k] for k in range(9)] + [tenths[9] + tenths[10]],
        "shards": {scenario.name: scenario.timeline.n_shards for scenario in scenarios},
        "stores": sum(scenario.stores for scenario in scenarios),
        "resumes": sum(scenario.resumes for scenario in scenarios),
        "files_damaged": sum(scenario.damaged for scenario in scenarios),
        "workers_ended_after_seconds": round(max(kill.orphan_seconds for kill in kills), 2),
        "workers_wrote_for_seconds": round(max(kill.late_seconds for kill in kills), 2),
        "seconds": round(seconds, 1),
        "differences": sum(scenario.differences for scenario in scenarios),
    }


def main() -> int:
    """Kill and resume jobs, and print the figures; 1 if there are differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--worker-kills", type=int, help="kills of jobs with two workers; a tenth by default")
    parser.add_argument("--growth-kills", type=int, help="kills of growing stores; a tenth by default")
    parser.add_argument("--power-loss", action="store_true", help="damage what is not committed after each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=SHM if SHM.is_dir() else None, help="folder of the stores")
    add_record_options(parser)
    options = parser.parse_args()
    numbers = [
        options.kills // 10 if number is None else number for number in (options.worker_kills, options.growth_kills)
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scenarios = prepare(Path(folder), random.Random(options.seed), options.power_loss)
        kill_all(scenarios, options.kills, *numbers)
    measured = figures(scenarios, time.monotonic() - started)
    for name, value in measured.items():
        print(f"{name.replace('_', ' ')}: {_in_words(value)}")
    if options.out:
        options.out.write_text(json.dumps({**machine(), **measured}, indent=1) + "\n")
    late = measured["workers_ended_after_seconds"] > ORPHAN_SECONDS
    if late:
        print(f"workers outlived their job by more than {ORPHAN_SECONDS:.0f} s")
    print(f"{measured['kills']} kills, {measured['differences']} differences")
    return int(measured["differences"] > 0 or late)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
