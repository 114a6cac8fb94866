"""The summary of a run: a table for the terminal, and `report.html`, one file that loads nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapt.report.chart import chart
from adapt.report.comparison import METRIC_NAMES, UNKNOWN, Comparison, headline, percent, sections_of
from adapt.report.seed_averages import Metric, Stat, Summary, differing_by_method, label, summarize
from adapt.run_dir.files import write_text
from adapt.run_dir.results import Row
from store.console.visible import visible
from store.errors import UserError


@dataclass(frozen=True)
class Column:
    """One column of the tables; `brief` ones are shown in the terminal too. Without any value it is left out.

    A header breaks where the terminal is to break it, so that the figures fit into 80 columns.
    """

    header: str
    cell: Callable[[Summary], str]
    brief: bool = True


def columns_of(section: Comparison) -> list[Column]:
    others: list[Metric] = [name for name in METRIC_NAMES if name != section.metric]
    columns = [
        Column(f"{METRIC_NAMES[section.metric]}\n%", lambda s: percent(section.stat(s))),
        Column("error\n%", lambda s: _error(section.stat(s))),
        Column("trained", lambda s: f"{s.trainable_params:,}"),
        Column("head", lambda s: f"{s.head_params:,}"),
        Column("s\n/epoch", lambda s: _number(s.seconds_per_epoch)),
        Column("samples\n/s", lambda s: _number(s.samples_per_second)),
        Column("peak\nMiB", lambda s: _mebibytes(s.peak_memory_bytes)),
        Column("break\neven\nepochs", lambda s: _number(s.break_even_epochs)),
        *(_metric_column(metric) for metric in others),
        Column("extract\ns", lambda s: _number(s.extract_seconds), brief=False),
        Column("GFLOPs\n/image", lambda s: _number(s.inference_gflops), brief=False),
        Column("store\nMiB", lambda s: _mebibytes(s.store_bytes), brief=False),
        Column("seeds", lambda s: str(len(s.seeds)), brief=False),
    ]
    return [column for column in columns if any(column.cell(s) != UNKNOWN for s in section.summaries)]


def _metric_column(metric: Metric) -> Column:
    return Column(f"{METRIC_NAMES[metric]}\n%", lambda s: percent(getattr(s, metric)), brief=False)


def _error(stat: Stat | None) -> str:
    return UNKNOWN if stat is None else f"{100 - stat.mean:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(n_bytes: int | None) -> str:
    return _number(None if n_bytes is None else n_bytes / 2**20)


def print_table(summaries: Sequence[Summary], console: Console) -> None:
    """One table and one line of conclusion for every dataset and backbone."""
    if not summaries:
        console.print("no results yet")
    for section in sections_of(summaries):
        columns = [column for column in columns_of(section) if column.brief]
        table = Table(title=_text(section.title), box=box.SIMPLE, padding=0)
        table.add_column("method", overflow="fold")
        for column in columns:
            table.add_column(column.header, justify="right", no_wrap=True)
        for summary in section.summaries:
            style = "bold" if summary == section.best else ""
            table.add_row(_text(summary.label), *(Text(c.cell(summary)) for c in columns), style=style)
        console.print(table)
        console.print(_text(headline(section)))


def _text(foreign: str) -> Text:
    """Text, not str: a user's [brackets] are no markup."""
    return Text(visible(foreign))


def _shown(value: Any) -> Any:
    """What the template prints, before it is escaped; the chart has seen to itself."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write_report(run_dir: str | Path, rows: Sequence[Row], config_text: str | None = None, title: str = "") -> Path:
    """`report.html` in the run directory, whose name is its title where none is given.

    Args:
        config_text: the resolved configuration, as YAML.
    """
    if not rows:
        raise UserError(f"no results to report in {run_dir}: run `sidecache run` first")
    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("adapt.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    shown = differing_by_method(rows)
    page = template.render(
        name=title or Path(run_dir).resolve().name,
        sections=sections_of(summarize(rows)),
        columns_of=columns_of,
        headline=headline,
        chart=chart,
        rows=[(label(row, shown[row.method]), row) for row in rows],
        config_text=config_text,
    )
    path = Path(run_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page + "\n")
    return path
