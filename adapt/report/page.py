"""Writes `report.html`: the tables and charts of a run in one file that loads nothing from elsewhere."""

from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from adapt.report.chart import chart
from adapt.report.comparison import comparisons_of, headline, legend
from adapt.report.seed_averages import differing_by_method, label, summarize
from adapt.report.table import table_columns
from adapt.run_dir.files import write_text
from adapt.run_dir.predictions import find_predictions
from adapt.run_dir.results import Row, in_order
from store.console.visible import visible
from store.errors import UserError


def write_report(
    run_dir: str | Path,
    rows: Sequence[Row],
    config_text: str | None = None,
    title: str = "",
    methods: Sequence[str] = (),
) -> Path:
    """Write `report.html` into a run directory, with intervals from the predictions that the directory has.

    Args:
        run_dir: the run directory.
        rows: its rows.
        config_text: the resolved configuration, as YAML.
        title: default: the name of the run directory.
        methods: names of methods in the order in which they are shown; others follow by name.

    Returns:
        The path of the report.

    Raises:
        UserError: there are no rows, or predictions are damaged.
        JobError: the file cannot be written.
    """
    if not rows:
        raise UserError(f"no results to report in {run_dir}: run `sidecache run` first")
    in_label = differing_by_method(rows)
    page = _template().render(
        name=title or Path(run_dir).resolve().name,
        comparisons=comparisons_of(summarize(rows, methods), partial(find_predictions, Path(run_dir))),
        table_columns=table_columns,
        headline=headline,
        legend=legend,
        chart=chart,
        rows=[(label(row, in_label[row.method]), row) for row in in_order(rows, methods)],
        config_text=config_text,
    )
    path = Path(run_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page + "\n")
    return path


def _template() -> Template:
    environment = Environment(
        autoescape=True, finalize=_visible_text, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("adapt.report").joinpath("page.html.j2").read_text(encoding="utf-8"))


def _visible_text(value: Any) -> Any:
    """A value of the template, before it is escaped; the chart, which is markup, has escaped its texts already."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
