"""Does what the commands `run`, `plan`, `extract`, `train` and `report` say, for a single job or a study."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sidecache
from adapt.across_runs.combined_report import write_combined_report
from adapt.config.pipeline import Config
from adapt.config.study import Study
from adapt.job.extraction import OnChanged
from adapt.job.inputs import Inputs
from adapt.planning.other_machine import OtherMachine
from adapt.planning.pilot import Pilot
from adapt.planning.pilot_report import print_pilot
from adapt.planning.plan import print_plan
from adapt.planning.planner import make_plan, parse_bytes
from adapt.planning.preset_choice import find_pilot
from adapt.report.table import print_table
from adapt.study.checks import failure_of
from adapt.study.plan import plan_study, print_study_plan
from adapt.study.record import has_record
from adapt.study.results import StudyResult, read_study_results
from adapt.training.distributed import world
from extract.forward.device import configure_process
from sidecache.messages import log, print_json
from sidecache.steps import log_extraction, print_results, write_run_report
from sidecache.studies import extract_study, run_study, train_study
from store.console.terminal import Terminal
from store.errors import UserError


def run(job: Config | Study, on_changed: OnChanged) -> None:
    """Extract, train and report, and print the table."""
    if isinstance(job, Study):
        _finish(run_study(job, on_changed=on_changed))
    else:
        sidecache.run(job, on_changed=on_changed)
        print_results(job.run_dir)


def extract(job: Config | Study, on_changed: OnChanged) -> None:
    """Extract what the store, or the store of every part, lacks."""
    if isinstance(job, Study):
        _require_all(extract_study(job, on_changed=on_changed))
    else:
        log_extraction(sidecache.extract(job, on_changed=on_changed), job)


def train(job: Config | Study) -> None:
    """Train and report, and print the table."""
    if isinstance(job, Study):
        _finish(train_study(job))
    else:
        sidecache.train(job)
        print_results(job.run_dir)


def plan(
    job: Config | Study, budget: str | None, machine: OtherMachine, *, with_pilot: bool, as_json: bool, title: str
) -> None:
    """Print the plan, after that of the pilot of every part."""
    title += f", on {machine.description}" if machine.description else ""
    configure_process()
    n_bytes = None if budget is None else parse_bytes(budget)
    pilots = _run_pilots(job) if with_pilot else {}
    if isinstance(job, Study):
        of_study = plan_study(job, n_bytes, machine=machine)
        show, document = partial(print_study_plan, of_study, title), of_study.document()
    else:
        of_job = make_plan(job, n_bytes, machine=machine)
        show, document = partial(print_plan, of_job, title), of_job.document()
    if as_json:
        of_pilots = {"pilots": {name: pilot.model_dump() for name, pilot in pilots.items()}} if with_pilot else {}
        print_json(document | of_pilots)
        return
    for name, pilot in pilots.items():
        print_pilot(pilot, name)
    show()


def _run_pilots(job: Config | Study) -> dict[str, Pilot]:
    """The pilot of a job, or of every part of a study that can start, by name."""
    if isinstance(job, Config):
        return {job.name: find_pilot(job, Inputs(job), log)}
    pilots = dict[str, Pilot]()
    for part in job.parts:

        def run_one(name: str = part.name, config: Config = part.config) -> None:
            pilots[name] = find_pilot(config, Inputs(config), log)

        if reason := failure_of(run_one):
            log(f"{part.name} has no pilot: {reason}")
    return pilots


def report(run_dirs: Sequence[Path], output: Path | None) -> None:
    """Print the table, and write report.html again, or one report of all runs to `output`."""
    if output is not None:
        print_table(write_combined_report(run_dirs, output).comparisons(), Terminal())
        log(f"report: {output}")
    elif len(run_dirs) > 1:
        raise UserError("a report of several run directories needs a file of its own: add --output FILE.html")
    elif has_record(run_dirs[0]):
        result = read_study_results(run_dirs[0])
        result.write()
        _print_study(result)
    else:
        write_run_report(run_dirs[0])
        print_results(run_dirs[0])


def _finish(result: StudyResult) -> None:
    """Print the results of a study on rank 0, and refuse parts that failed."""
    if world().is_main_process:
        _print_study(result)
    _require_all(result)


def _require_all(result: StudyResult) -> None:
    """Refuse a study of which parts failed; by rank 0 alone, since torchrun stops it as soon as another rank fails.

    Raises:
        JobError: the message has names and reasons of the parts.
    """
    here = world()
    here.barrier()
    if here.is_main_process:
        result.require_all()


def _print_study(result: StudyResult) -> None:
    result.print()
    log(f"results: {result.run_dir / 'results.csv'}, report: {result.run_dir / 'report.html'}")
