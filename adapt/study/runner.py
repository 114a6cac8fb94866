"""Works through the parts of a study one after the other; a part that fails is recorded, and the others go on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from adapt.config.pipeline import Config
from adapt.config.study import Part, Study
from adapt.job.executor import Executor
from adapt.job.feature_set import Log
from adapt.study.checks import failure_of
from adapt.study.record import PartRecord, StudyRecord, new_record, write_record
from adapt.training.distributed import own_run_dir, world
from store.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is done with every part of a study.

    Attributes:
        command: its name.
        checks: each returns why a part cannot start, or None; all parts are checked before the first starts.
        work: does the work on the configuration of a part, with the executor that runs its trials.
    """

    command: Literal["run", "extract", "train"]
    checks: Sequence[Callable[[Config], str | None]]
    work: Callable[[Config, Executor], object]


def work_through(study: Study, stage: Stage, executor: Executor, log: Log) -> StudyRecord:
    """Check all parts of a study, then do the work of each; `study.json` is up to date after every part.

    Args:
        study: the study.
        stage: what is done.
        executor: runs the trials; if it has workers, all parts are under way at once, the first ones first.
        log: is called with one line for every part, and one for every failure.

    Returns:
        what became of the parts.

    Raises:
        UserError: no run directory can be made.
        JobError: another study is running in it, or its record is damaged. Under torchrun also if a part fails, since
            its processes cannot wait for one another any longer.
    """
    with own_run_dir(study.run_dir):
        keeper = _Keeper(study, new_record(study, stage.command), log)
        to_do = [part for part in study.parts if not keeper.note_obstacle(part, stage.checks)]
        keeper.save()

        def work(number: int) -> None:
            part = to_do[number]
            log(f"part {number + 1} of {len(to_do)}: {part.name}")
            keeper.note_work(part, lambda config: stage.work(config, executor.for_part(number)))

        executor.map(work, range(len(to_do)))
        return keeper.record


class _Keeper:
    """The record of a study while it runs."""

    def __init__(self, study: Study, record: StudyRecord, log: Log) -> None:
        self._study, self.record, self._log, self._mutex = study, record, log, Lock()

    def note_obstacle(self, part: Part, checks: Sequence[Callable[[Config], str | None]]) -> bool:
        """Record why a part cannot start; whether that is so."""
        reason = next((reason for check in checks if (reason := check(part.config))), None)
        if reason:
            self._replace(part, status="failed", reason=reason)
        return reason is not None

    def note_work(self, part: Part, work: Callable[[Config], object]) -> None:
        """Do the work of a part, and record what became of it."""
        started = time.perf_counter()
        reason = failure_of(lambda: work(part.config))
        seconds = self._of(part).seconds + time.perf_counter() - started
        with self._mutex:  # parts may end at the same time
            self._replace(part, status="failed" if reason else "done", reason=reason or "", seconds=seconds)
            self.save()
        if reason and world().size > 1:
            raise JobError(f"{part.name} failed: {reason}; under torchrun the study ends there")

    def save(self) -> None:
        """Write the record; a disk that refuses it, as one that a part has filled, does not end the study."""
        if not world().is_main_process:
            return
        try:
            write_record(self._study.run_dir, self.record)
        except JobError as error:
            self._log(str(error))

    def _of(self, part: Part) -> PartRecord:
        return next(record for record in self.record.parts if record.name == part.name)

    def _replace(self, part: Part, **changes: object) -> None:
        record = self._of(part).model_copy(update=changes)
        self.record = self.record.with_part(record)
        if record.status == "failed":
            self._log(f"{part.name} failed: {record.reason}")
