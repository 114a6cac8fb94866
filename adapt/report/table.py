"""Builds the columns of the result tables, and prints the tables in the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from adapt.report.comparison import UNKNOWN, Comparison, headline, interval_text, legend, percent
from adapt.report.seed_averages import Stat, Summary
from adapt.run_dir.results import COLUMNS
from store.console.visible import visible

_LONGEST_LABEL = 40  # characters of a method's name before it wraps
_WIDER_THAN_ANY = 10_000  # characters of a table
_FEWEST_COLUMNS = 3  # the metric, its interval, and one more, such as the number of seeds


@dataclass(frozen=True)
class TableColumn:
    """One column of the tables; only `brief` ones are shown in the terminal.

    The header has line breaks, so that the numbers fit into 80 columns.
    """

    header: str
    cell: Callable[[Summary], str]
    brief: bool


def table_columns(comparison: Comparison) -> list[TableColumn]:
    """The columns that have a value: the metric with its interval, the brief ones, the other metrics, the rest."""
    declared = {field: table_column(field) for field, column in COLUMNS.items() if column.name}
    metric = declared.pop(comparison.metric)
    metrics = [column for field, column in declared.items() if COLUMNS[field].average == "mean_std"]
    costs = [column for field, column in declared.items() if COLUMNS[field].average != "mean_std"]
    columns = [
        TableColumn(metric.header, metric.cell, brief=True),
        TableColumn("95 % CI\n%", lambda summary: interval_text(comparison, summary), brief=True),
        TableColumn("error\n%", lambda summary: _error(comparison.stat(summary)), brief=False),
        *(column for column in costs if column.brief),
        *metrics,
        *sorted((column for column in costs if not column.brief), key=lambda column: column.header.lower()),
        TableColumn("seeds", lambda summary: str(len(summary.seeds)), brief=False),
    ]
    if _seeds_differ(comparison):  # then every row says it, beside its mean
        columns.insert(2, replace(columns.pop(), brief=True))
    return [column for column in columns if any(column.cell(s) != UNKNOWN for s in comparison.summaries)]


def _seeds_differ(comparison: Comparison) -> bool:
    return any(comparison.seeds_note(summary) for summary in comparison.summaries)


def table_column(field: str) -> TableColumn:
    """The column that a field of `Row` declares."""
    column = COLUMNS[field]
    header = "\n".join(part for part in (column.name, column.unit) if part)
    if column.average == "mean_std":
        return TableColumn(header, lambda summary: percent(summary.metrics[field]), column.brief)
    scale = 2**20 if column.unit == "MiB" else 1
    return TableColumn(header, lambda summary: _number(summary.costs[field], scale), column.brief)


def _error(stat: Stat | None) -> str:
    return UNKNOWN if stat is None else f"{100 - stat.mean:.2f}"


def _number(value: int | float | None, scale: int) -> str:
    """Three significant digits, or all digits before the point."""
    if value is None:
        return UNKNOWN
    value /= scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print a table, its legend and a headline for each comparison."""
    if not comparisons:
        console.print("no results yet")
    for comparison in comparisons:
        console.print(_table_that_fits(comparison, console))
        for line in legend(comparison):
            console.print(_text(line))
        console.print(_text(headline(comparison)))


def _table_that_fits(comparison: Comparison, console: Console) -> Table:
    """The table with as many of its last columns left out as do not fit beside the names of the methods."""
    columns = [column for column in table_columns(comparison) if column.brief]
    unlimited = console.options.update(max_width=_WIDER_THAN_ANY)
    while True:
        table = _table(comparison, columns)
        if len(columns) <= _FEWEST_COLUMNS or Measurement.get(console, unlimited, table).maximum <= console.width:
            return table
        columns.pop()


def _table(comparison: Comparison, columns: Sequence[TableColumn]) -> Table:
    table = Table(title=_text(comparison.title), box=box.SIMPLE, padding=0)
    table.add_column("method", overflow="fold", max_width=_LONGEST_LABEL)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for summary in comparison.summaries:
        style = "bold" if summary == comparison.best else ""
        table.add_row(_text(summary.label), *(Text(c.cell(summary)) for c in columns), style=style)
    return table


def print_failures(failures: Sequence[tuple[str, str]], console: Console, title: str = "failed") -> None:
    """Print a table of the jobs that failed; nothing if there are none.

    Args:
        failures: name and reason of each.
        title: of the table; their number is added.
    """
    if not failures:
        return
    table = Table(title=f"{title} ({len(failures)})", box=box.SIMPLE, padding=0)
    table.add_column("part", overflow="fold", style="bold")
    table.add_column("reason", overflow="fold")
    for name, reason in failures:
        table.add_row(_text(name), _text(reason))
    console.print(table)


def _text(untrusted: str) -> Text:
    """A `Text`, in which [brackets] are not markup."""
    return Text(visible(untrusted))
