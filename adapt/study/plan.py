"""Plans a study before it runs: bytes, seconds and trials of every part and of the whole."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

from adapt.config.study import Part, Study
from adapt.planning.job_facts import JobFacts
from adapt.planning.other_machine import OtherMachine
from adapt.planning.plan import Plan
from adapt.planning.planner import plan_job
from adapt.planning.speeds import Speeds, decode_seconds, measure_speeds
from adapt.report.comparison import UNKNOWN
from adapt.report.table import print_failures
from adapt.study.checks import StartChecks, failure_of
from store.address import disk_number, store_url
from store.console.duration import duration
from store.console.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """The plan of a part, or why there is none.

    Attributes:
        name: of the part.
        plan: of its job; None if the part cannot start.
        reason: why it cannot start; else empty.
        disk: number of the disk of its store; None if that is not local.
    """

    name: str
    plan: Plan | None
    reason: str = ""
    disk: int | None = None

    @property
    def store_bytes(self) -> int:
        """Bytes of the store; none if the features are computed online."""
        return self.plan.store_bytes or 0 if self.plan and self.plan.feature_source != "online" else 0

    @property
    def new_bytes(self) -> int:
        """Those of them that the extraction will write."""
        if self.plan is None or not self.store_bytes:
            return 0
        return (self.plan.samples_to_extract or 0) * self.plan.bytes_per_sample


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """The plan of a study; totals are those of the parts that can start.

    Attributes:
        parts: their plans.
        budget_bytes: bytes that all stores together may take; None for no limit.
    """

    parts: tuple[PartPlan, ...]
    budget_bytes: int | None = None

    @property
    def plans(self) -> list[Plan]:
        """Of the parts that can start."""
        return [part.plan for part in self.parts if part.plan]

    @property
    def notes(self) -> list[str]:
        """What would stop the study or one of its parts."""
        of_parts = [f"{part.name}: {note}" for part in self.parts if part.plan for note in part.plan.notes]
        return [*self._too_large(), *of_parts]

    def totals(self) -> dict[str, Any]:
        """Sums over the parts that can start; seconds are None if those of a part are unknown."""
        return {
            "parts": len(self.plans),
            "store_bytes": sum(part.store_bytes for part in self.parts),
            "bytes_to_extract": sum(part.new_bytes for part in self.parts),
            "budget_bytes": self.budget_bytes,
            "fits": not self._too_large(),
            "extract_seconds": _sum([plan.extract_seconds for plan in self.plans]),
            "trials": sum(plan.trials for plan in self.plans),
            "train_seconds": _sum([plan.train_seconds for plan in self.plans]),
        }

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        parts = [
            {"name": part.name, "reason": part.reason, "plan": part.plan.document() if part.plan else None}
            for part in self.parts
        ]
        return {"parts": parts, "total": self.totals(), "notes": self.notes}

    def _too_large(self) -> list[str]:
        """Which disks, or the budget, the stores together do not fit."""
        found = []
        for disk in sorted({part.disk for part in self.parts if part.plan and part.disk is not None}):
            on_disk = [part for part in self.parts if part.disk == disk]
            needed = sum(part.new_bytes for part in on_disk)
            free = min(part.plan.free_bytes for part in on_disk if part.plan and part.plan.free_bytes is not None)
            if needed > free:
                names = ", ".join(part.name for part in on_disk)
                found.append(
                    f"the stores of {names} take {decimal(needed)} of one disk, which has {decimal(free)} free"
                )
        total = sum(part.store_bytes for part in self.parts)
        if self.budget_bytes is not None and total > self.budget_bytes:
            found.append(f"all stores take {decimal(total)}, more than the budget of {decimal(self.budget_bytes)}")
        return found


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


class _SpeedsByShape:
    """Speeds that are measured once for all parts of the same backbone, kind of clips and disk.

    The parts of a study agree in everything else that they depend on, except for the number of classes, which hardly
    matters. Decoding is measured for every part.
    """

    def __init__(self, machine: OtherMachine | None = None) -> None:
        self._machine = machine
        self._known: dict[tuple[str, str, int | None], Speeds] = {}

    def of(self, job: JobFacts, disk: int | None) -> Speeds:
        """Speeds of a part, on this machine or on the other one."""
        measured = self._measure(job, disk)
        return self._machine.speeds(measured, job) if self._machine else measured

    def _measure(self, job: JobFacts, disk: int | None) -> Speeds:
        clips = job.config.data.clips
        key = (job.config.backbone.model_dump_json(), clips.model_dump_json() if clips else "", disk)
        if key not in self._known:
            self._known[key] = measure_speeds(job)
            return self._known[key]
        decode = decode_seconds(job.source.splits["train"], job.shape) if job.source else None
        return replace(self._known[key], decode=decode)


def plan_study(
    study: Study, budget: int | None = None, with_speeds: bool = True, machine: OtherMachine | None = None
) -> StudyPlan:
    """Estimate what a study will cost, without extracting or keeping anything; see `make_plan`.

    Args:
        study: from `load_study`.
        budget: bytes that all stores together may take.
        with_speeds: false leaves out the measurements, and all values that depend on them.
        machine: figures of the machine that the study will run on, where it is not this one.
    """
    checks, speeds = StartChecks(), _SpeedsByShape(machine) if with_speeds else None
    return StudyPlan(parts=tuple(_plan_part(part, checks, speeds) for part in study.parts), budget_bytes=budget)


def _plan_part(part: Part, checks: StartChecks, speeds: _SpeedsByShape | None) -> PartPlan:
    config, plans = part.config, list[PartPlan]()

    def make() -> None:
        job, disk = JobFacts(config), disk_number(store_url(config.store.path))
        plan = plan_job(job, speeds.of(job, disk) if speeds else None)
        plans.append(PartPlan(name=part.name, plan=plan, disk=disk))

    reason = checks.methods(config) or checks.inputs(config) or failure_of(make)
    return PartPlan(name=part.name, plan=None, reason=reason) if reason else plans[0]


def print_study_plan(plan: StudyPlan, title: str) -> None:
    """Print the plan of a study on standard output: a row a part, the total, and what would stop it."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("part", overflow="fold")
    for header in ("samples", "store", "extraction", "trials", "training"):
        table.add_column(header, justify="right")
    for part in plan.parts:
        if part.plan:
            table.add_row(part.name, *_cells(part.plan))
    total = plan.totals()
    table.add_section()
    sums = _sums(total["store_bytes"], total["extract_seconds"], total["trials"], total["train_seconds"])
    table.add_row(f"total of {total['parts']}", "", *sums, style="bold")
    console = Terminal()
    console.print(table)
    print_failures([(part.name, part.reason) for part in plan.parts if part.reason], console, "cannot start")
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False)


def _cells(plan: Plan) -> Iterator[str]:
    yield UNKNOWN if plan.samples is None else f"{sum(plan.samples.values()):,}"
    yield from _sums(plan.store_bytes, plan.extract_seconds, plan.trials, plan.train_seconds)


def _sums(
    n_bytes: int | None, extract_seconds: float | None, trials: int, train_seconds: float | None
) -> Iterator[str]:
    yield UNKNOWN if n_bytes is None else decimal(n_bytes)
    yield _seconds(extract_seconds)
    yield f"{trials:,}"
    yield _seconds(train_seconds)


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)
