"""Writes `report.html`: the tables and charts of runs in one file that loads nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adapt.report.cache_cost import cache_cost
from adapt.report.chart import charts
from adapt.report.comparison import headline, legend
from adapt.report.method_details import details_of
from adapt.report.mistakes import mistakes_of
from adapt.report.overview import OVERVIEW_LEGEND, overview
from adapt.report.reported_rows import ReportedRows
from adapt.report.table import table_columns
from adapt.report.trained_from import kinds_of, trained_from
from adapt.run_dir.files import write_text
from store.console.visible import visible
from store.errors import UserError

_OF_COMPARISONS = {
    "table_columns": table_columns,
    "headline": headline,
    "legend": legend,
    "cache_cost": cache_cost,
    "charts": charts,
    "kinds_of": kinds_of,
    "trained_from": trained_from,
    "overview": overview,
    "overview_legend": OVERVIEW_LEGEND,
    "zip": zip,
}


def write_report(
    run_dir: str | Path,
    reported: ReportedRows,
    config_text: str | None = None,
    title: str = "",
    failures: Sequence[tuple[str, str]] = (),
    file_name: str = "report.html",
) -> Path:
    """Write a report into a run directory.

    Args:
        run_dir: the run directory, or any other folder.
        reported: its rows.
        config_text: the resolved configuration, as YAML.
        title: default: the name of the run directory.
        failures: name and reason of the jobs that failed.
        file_name: of the report.

    Returns:
        The path of the report.

    Raises:
        UserError: there are neither rows nor failures, or predictions are damaged.
        JobError: the file cannot be written, or that of a curve, a search or a job is damaged.
    """
    if not reported.rows and not failures:
        raise UserError(f"no results to report in {run_dir}: run `sidecache run` first")
    name = title or Path(run_dir).resolve().name
    page = _render(name=name, config_text=config_text, failures=failures, **_values_of(reported))
    path = Path(run_dir) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page + "\n")
    return path


def _values_of(reported: ReportedRows) -> dict[str, Any]:
    """What the template shows of some rows."""
    comparisons = reported.comparisons()
    return {
        "comparisons": comparisons,
        "details_of": partial(details_of, reported=reported, n_comparisons=len(comparisons)),
        "mistakes_of": partial(mistakes_of, reported=reported),
        "records": reported.job_records(),
        "rows": reported.labeled(),
    }


def _render(**values: Any) -> str:
    script = _asset("table.js")
    environment = Environment(
        loader=PackageLoader("adapt.report"),
        autoescape=True,
        finalize=_visible_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = {"style": _asset("style.css"), "script": script, "security_policy": _security_policy(script)}
    return environment.get_template("page.html.j2").render(**values, **parts, **_OF_COMPARISONS)


def _asset(name: str) -> Markup:
    """A style sheet or a script of the page, which is no text of a user."""
    return Markup(files("adapt.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _security_policy(script: str) -> str:
    """What a browser lets the page do: run its own script, and nothing else; load nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _visible_text(value: Any) -> Any:
    """A value of the template, before it is escaped; a drawing, which is markup, has escaped its texts already."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
