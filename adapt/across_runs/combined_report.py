"""Writes one report of several runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from adapt.across_runs.runs import Runs, read_runs
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.run_dir.config_file import read_config
from store.errors import UserError


def write_combined_report(paths: Sequence[Path], output: Path) -> ReportedRows:
    """Write one report of several runs; a trial that several of them have counts once.

    Args:
        paths: run directories, or folders that contain some at any depth.
        output: the file; it ends in `.html`.

    Returns:
        what is reported.

    Raises:
        UserError: there are no results, a file is damaged, or `output` is no file for a page.
        JobError: a file is damaged, or the report cannot be written.
    """
    if output.suffix != ".html" or output.is_dir():
        raise UserError(f"--output: given {output}; legal: a file that ends in .html")
    runs = read_runs(paths)
    reported = ReportedRows(rows=runs.rows, methods=runs.methods, run_dirs=runs.run_dirs)
    folders = list(dict.fromkeys(runs.run_dirs.values()))
    title = folders[0].name if len(folders) == 1 else f"{len(folders)} runs"
    write_report(output.parent, reported, "\n".join(_configs(runs)), title, file_name=output.name)
    return reported


def _configs(runs: Runs) -> Iterator[str]:
    """The configuration of every run, after its folder."""
    for run_dir in dict.fromkeys(runs.run_dirs.values()):
        text, _ = read_config(run_dir)
        if text is not None:
            yield f"# {run_dir}\n{text}"
