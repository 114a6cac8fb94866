"""Kills extractions, resumes them, and compares what becomes of them with a store that was never interrupted.

    python -m benchmarks.torture --kills 200
    python -m benchmarks.torture --kills 200 --power-loss

Each store, of 42 shards or more, is killed several times, uniformly between the first write to it and the last one, and
resumed each time; when it is whole it must be the uninterrupted one, byte for byte (but for `_log`, which keeps times).
The last kills are aimed, so that a tenth or more of all hit the writing of data, of commit marks and of metadata each.
A tenth hit jobs of two worker processes, the job or one of the workers, and a tenth a store that grows by samples and
layers. With `--power-loss`, whatever is not committed when a job dies is cut off, zeroed or deleted.

Prints kills by what was being written, by who died, and by tenth of the job, resumes and seconds, and last a line with
kills and differences; the exit status is 0 where there are no differences. 200 kills take 5 to 10 minutes on two cores.
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
from kills import JOB, WORKER, WRITING, Aim, Course, Death, strike, wait_for_end
from PIL import Image
from power_loss import lose_power
from resume_worker import Job, Run, load_tiny
from small_store import contents
from write_trace import NOTHING, Trace

from benchmarks.record import add_record_options, machine

IMAGES = {"train": 59, "test": 23}  # the last shard of each is part-filled
AT_ONCE = {"one process": 8, "two workers": 2, "growth": 8}  # kills of one store, at most
SHM = Path("/dev/shm")
ORPHAN_SECONDS = 60.0  # for which workers may outlive their job: one that is starting imports torch before it looks


class Patient:
    """One kind of job, what it makes when nobody interrupts it, and what came of killing it."""

    def __init__(self, name: str, job: Job, folder: Path, draw: random.Random, power_loss: bool) -> None:
        self.name, self._job, self._folder, self._draw, self._power_loss = name, job, folder, draw, power_loss
        self.deaths: list[Death] = []
        self.stores = self.resumes = self.damaged = self.differences = 0
        folder.mkdir(parents=True)

    def prepare(self, base: Path | None = None) -> None:
        """Run the job uninterrupted; `base` is the store that it finds, if any."""
        self._base = base
        run, trace = self._start(self._new_store(), replace(self._job, workers=1))
        self._end(run)
        trace.update()
        self._whole, self.course = contents(self._folder / "c.zarr"), Course(trace)

    def kill(self, phases: Sequence[str | None]) -> None:
        """Kill one store as often as there are phases; None stands for any."""
        store, positions = self._new_store(), sorted(self._draw.random() for _ in phases)
        run, trace = self._start(store, self._job)
        for phase, position in zip(phases, positions, strict=True):
            victim = self._draw.choice((JOB, WORKER)) if self._job.workers > 1 else JOB
            death = strike(run, trace, self.course, Aim(position, phase, victim), self._draw)
            if death is None:
                break
            self.deaths.append(death)
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
            print(f"{self.name}: a run that nobody killed ended with status {status}")
            self.differences += 1

    def _compare(self, found: dict[str, bytes]) -> None:
        self.stores += 1
        names = sorted(name for name in found.keys() | self._whole if found.get(name) != self._whole.get(name))
        for name in names:
            what = "missing" if name not in found else "other bytes" if name in self._whole else "too many"
            print(f"{self.name}, store {self.stores}: {name}: {what}")
        self.differences += len(names)


def draw_images(root: Path) -> None:
    """Noise, in two classes."""
    draw = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for number in range(count):
            folder = root / split / ("blue", "red")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (32, 40, 3), np.uint8)).save(folder / f"{number:02}.png")


def prepare(folder: Path, draw: random.Random, power_loss: bool) -> list[Patient]:
    """The three kinds of jobs, each with its uninterrupted store."""
    images, few = folder / "images", folder / "few"
    draw_images(images)
    shutil.copytree(images, few, ignore=shutil.ignore_patterns("*1.png", "*4.png", "*8.png"))
    job = Job(images, "int8", load_tiny())
    kinds = {"one process": job, "two workers": replace(job, workers=2), "growth": job}
    patients = [Patient(name, kind, folder / name, draw, power_loss) for name, kind in kinds.items()]
    base = folder / "base.zarr"
    if replace(job, images=few, layers=[1]).start(base).finish()[0]:
        raise SystemExit("the store that is to grow could not be made")
    for patient in patients:
        patient.prepare(base if patient.name == "growth" else None)
    return patients


def kill_all(patients: Sequence[Patient], kills: int, worker_kills: int, growth_kills: int) -> None:
    """The kills of one process come last: they fill up what is missing of each phase."""
    first, *others = patients
    for patient, wanted in zip(others, (worker_kills, growth_kills), strict=True):
        while (left := wanted - len(patient.deaths)) > 0:
            patient.kill([None] * min(left, AT_ONCE[patient.name]))
            show(patients)
    while phases := wanted_phases([death for patient in patients for death in patient.deaths], kills):
        first.kill(phases[: AT_ONCE[first.name]])
        show(patients)


def wanted_phases(deaths: Sequence[Death], kills: int) -> list[str | None]:
    """What is left to hit: half of all may hit anything, then what phases lack, then anything again."""
    hit = Counter(death.phase for death in deaths)
    lacking: list[str | None] = [phase for phase in WRITING for _ in range(kills // 10 - hit[phase])]
    return [None] * (kills // 2 - len(deaths)) or lacking or [None] * (kills - len(deaths))


def show(patients: Sequence[Patient]) -> None:
    if sys.stderr.isatty():
        print(f"\r{sum(len(patient.deaths) for patient in patients)} kills", end="", file=sys.stderr)


def figures(patients: Sequence[Patient], seconds: float) -> dict[str, Any]:
    """What is printed, and kept as JSON."""
    deaths = [death for patient in patients for death in patient.deaths]
    phases, tenths = Counter(death.phase for death in deaths), Counter(int(10 * death.position) for death in deaths)
    victims = Counter(f"{patient.name}: {death.victim}" for patient in patients for death in patient.deaths)
    return {
        "kills": len(deaths),
        "kills_by_phase": {phase: phases[phase] for phase in (*WRITING, NOTHING)},
        "kills_by_victim": dict(sorted(victims.items())),
        "kills_by_tenth": [tenths[k] for k in range(9)] + [tenths[9] + tenths[10]],
        "shards": {patient.name: patient.course.n_shards for patient in patients},
        "stores": sum(patient.stores for patient in patients),
        "resumes": sum(patient.resumes for patient in patients),
        "files_damaged": sum(patient.damaged for patient in patients),
        "workers_ended_after_seconds": round(max(death.orphan_seconds for death in deaths), 2),
        "workers_wrote_for_seconds": round(max(death.late_seconds for death in deaths), 2),
        "seconds": round(seconds, 1),
        "differences": sum(patient.differences for patient in patients),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--worker-kills", type=int, help="of them, of jobs of two workers; a tenth where not given")
    parser.add_argument("--growth-kills", type=int, help="of them, of stores that grow; a tenth where not given")
    parser.add_argument("--power-loss", action="store_true", help="damage what is not committed after each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=SHM if SHM.is_dir() else None, help="where the stores lie")
    add_record_options(parser)
    given = parser.parse_args()
    shares = [given.kills // 10 if share is None else share for share in (given.worker_kills, given.growth_kills)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        patients = prepare(Path(folder), random.Random(given.seed), given.power_loss)
        kill_all(patients, given.kills, *shares)
    found = figures(patients, time.monotonic() - started)
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {_in_words(value)}")
    if given.out:
        given.out.write_text(json.dumps({**machine(), **found}, indent=1) + "\n")
    late = found["workers_ended_after_seconds"] > ORPHAN_SECONDS
    if late:
        print(f"workers outlived their job by more than {ORPHAN_SECONDS:.0f} s")
    print(f"{found['kills']} kills, {found['differences']} differences")
    return int(found["differences"] > 0 or late)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
