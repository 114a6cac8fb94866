"""Runs the commands on a study: each does the work of a single job for every part."""

from typing import TYPE_CHECKING

import sidecache
from adapt.config.pipeline import Config
from adapt.config.study import Study
from adapt.job.executor import Executor, InProcess, open_executor
from adapt.study.checks import StartChecks
from adapt.study.results import StudyResult, collect
from adapt.study.runner import Stage, work_through
from adapt.training.distributed import world
from extract.forward.device import configure_process
from sidecache.messages import log
from sidecache.steps import run_job, train_job

if TYPE_CHECKING:
    from adapt.job.extraction import OnChanged


def run_study(study: Study, on_changed: "OnChanged" = "fail") -> StudyResult:
    """Run a study: for every part, extract what its store lacks, train what is not trained yet, and report.

    A part that fails is recorded with its reason, and the others go on. What can be refused before the work, such as a
    missing folder, is found for all parts first. The same call goes on after an interruption and repeats nothing.

    Args:
        study: from `load_study`.
        on_changed: as of `sidecache.run`, for every part.

    Returns:
        the rows of all parts (`.rows`), what became of each (`.parts`) and those that failed (`.failures`).

    Raises:
        UserError: no run directory can be made.
        JobError: another study is running in it, its record is damaged, or the results cannot be written.
    """
    checks = StartChecks()
    stage = Stage(
        command="run",
        checks=(checks.methods, checks.inputs),
        work=lambda config, executor: run_job(config, executor, on_changed=on_changed),
    )
    return _report(study, stage)


def train_study(study: Study) -> StudyResult:
    """Train every method of every part from the stores that exist; arguments and errors are those of `run_study`."""
    return _report(study, Stage(command="train", checks=(StartChecks().methods,), work=train_job))


def extract_study(study: Study, on_changed: "OnChanged" = "fail") -> StudyResult:
    """Extract what the stores of all parts lack; arguments and errors are those of `run_study`."""
    from sidecache.steps import log_extraction

    def extract(config: Config, executor: Executor) -> None:
        log_extraction(sidecache.extract(config, on_changed=on_changed), config)

    config = study.parts[0].config
    sidecache.check_main_script(extract=config.extract)
    stage = Stage(command="extract", checks=(StartChecks().inputs,), work=extract)
    record = work_through(study, stage, InProcess(log, config.train.device), log)
    return collect(study.run_dir, record)


def _report(study: Study, stage: Stage) -> StudyResult:
    """Work through a study, and write the results of the whole."""
    config = study.parts[0].config
    sidecache.check_main_script(extract=config.extract, train=config.train)
    configure_process()
    with open_executor(config.train, log) as executor:
        record = work_through(study, stage, executor, log)
    result = collect(study.run_dir, record)
    if world().is_main_process:
        result.write()
    return result
