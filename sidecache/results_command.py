"""The command `sidecache results`. Imports are inside the function, so that `--help` does not wait for torch."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sidecache.messages import log

if TYPE_CHECKING:
    from adapt.across_runs.runs import Runs
    from adapt.across_runs.table import Table
    from adapt.report.comparison import Comparison

RunDirs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="run directories, or folders that contain some at any depth")
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="only trials with this value, such as method=losa, seed=0 or options.rank=8; may be repeated",
    ),
]
By = Annotated[
    Literal["dataset", "backbone", "method", "trial"] | None,
    typer.Option(help="means, with one column a data set, backbone or method; or one row a trial"),
]
Rank = Annotated[
    bool,
    typer.Option(
        "--rank", help="mean rank of every method over the data sets that have all methods; wins, losses and ties"
    ),
]
FormatOption = Annotated[
    Literal["table", "csv", "json", "markdown", "latex", "parquet", "svg"],
    typer.Option(
        "--format",
        help="csv, json and parquet have all figures unrounded; latex needs the package booktabs; svg is a figure",
    ),
]
Output = Annotated[Path | None, typer.Option(metavar="FILE", help="write to this file, not to the terminal")]


def results_command(
    runs: RunDirs,
    where: Where = None,
    by: By = None,
    rank: Rank = False,
    form: FormatOption = "table",
    output: Output = None,
) -> None:
    """Show the results of any number of runs as one table or figure: means, deviations, intervals and costs."""
    from adapt.across_runs.formats import format_table, print_table
    from adapt.run_dir.files import write_bytes
    from store.console.terminal import Terminal
    from store.errors import UserError

    if by and rank:
        raise UserError("--by and --rank make different tables: give one of the two")
    if form == "svg" and (by or rank):
        raise UserError("--format svg draws every method on every data set: leave out --by and --rank")
    if form == "parquet" and output is None:
        raise UserError("--format parquet needs a file: add --output FILE.parquet")
    found = _read(runs, where or [])
    if form == "table" and output is None:
        print_table(_make_table(found, by, rank), Terminal())
        return
    content = _draw(found) if form == "svg" else format_table(_make_table(found, by, rank), form)
    if output:
        write_bytes(output, memoryview(content))
    else:
        print(content.decode(), end="")


def _read(paths: list[Path], where: list[str]) -> "Runs":
    from adapt.across_runs.runs import read_runs
    from adapt.across_runs.selection import select

    runs = read_runs(paths)
    return replace(runs, rows=select(runs.rows, where))


def _compare(runs: "Runs") -> "list[Comparison]":
    from adapt.report.reported_rows import ReportedRows

    return ReportedRows(rows=runs.rows, methods=runs.methods, run_dirs=runs.run_dirs).comparisons()


def _draw(runs: "Runs") -> bytes:
    from adapt.report.overview import overview_file  # imports matplotlib, which tables do not need

    return overview_file(_compare(runs)).encode()


def _make_table(runs: "Runs", by: Literal["dataset", "backbone", "method", "trial"] | None, is_ranked: bool) -> "Table":
    from adapt.across_runs.groups import group_table
    from adapt.across_runs.pivot import pivot_table
    from adapt.across_runs.ranks import rank, rank_table
    from adapt.across_runs.trials import trial_table
    from adapt.report.comparison import comparisons_of
    from adapt.report.seed_averages import summarize

    if by == "trial":
        return trial_table(runs)
    if is_ranked:
        ranking = rank(comparisons_of(summarize(runs.rows, runs.methods)), runs.read_predictions)
        for title in ranking.left_out:
            log(f"left out of the ranks: {title}")
        return rank_table(ranking)
    comparisons = _compare(runs)
    return pivot_table(comparisons, by) if by else group_table(comparisons)
