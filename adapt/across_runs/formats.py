"""Writes a table for the terminal, or as CSV, JSON, Markdown, LaTeX or Parquet.

Names come from data sets and users: what a format would interpret is escaped, and control characters become codes.
"""

import io
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from adapt.across_runs.table import Cell, Table
from adapt.run_dir.results import csv_text
from store.console.terminal import Terminal
from store.console.visible import one_line, visible

RecordFormat = Literal["csv", "json", "parquet"]
Format = RecordFormat | Literal["table", "markdown", "latex"]
_NAME = 12  # characters of a name that are not broken
_WIDEST = 1_000  # characters of a line in a file
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&])")
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "≈": r"$\approx$",
        "–": "--",
        "·": r"$\cdot$",
    }
)


def format_table(table: Table, how: Format) -> bytes:
    """A table as the content of a file."""
    if how in ("csv", "json", "parquet"):
        return format_records(table.records, how)
    if how == "table":
        text = _plain_text(table)
    else:
        text = "\n".join(_markdown(table) if how == "markdown" else _latex(table)) + "\n"
    return text.encode()


def format_records(records: Sequence[dict[str, Any]], how: RecordFormat) -> bytes:
    """Records, all with the same keys, as the content of a file for programs."""
    if how == "parquet":
        return _parquet(records)
    if how == "json":
        return (json.dumps(records, indent=1, allow_nan=False) + "\n").encode()
    shown = _visible_records(records)
    return csv_text(list(shown[0]), shown).encode()


def print_table(table: Table, console: Terminal) -> None:
    """Print a table with its legend; one that is too wide for the terminal is printed as wide as it is."""
    shown = RichTable(title=_plain(table.title) if table.title else None, box=box.SIMPLE, padding=0)
    for number, name in enumerate(table.header):
        is_name = number < table.n_names
        longest = max(len(row[number].text) for row in table.rows)
        shown.add_column(
            Text(visible(name)),
            justify="left" if is_name else "right",
            overflow="fold",
            min_width=min(longest, _NAME) if is_name else longest,
        )
    for row in table.rows:
        shown.add_row(*(Text(one_line(cell.text), style="bold" if cell.is_best else "") for cell in row))
    needed = Measurement.get(console, console.options, shown).minimum
    console.print(shown, width=max(console.width, needed), crop=False)
    for line in table.legend:
        console.print(_plain(line))


def _plain_text(table: Table) -> str:
    console = Terminal(file=io.StringIO(), width=_WIDEST)
    print_table(table, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _plain(text: str) -> Text:
    """A text in which [brackets] are not markup."""
    return Text(one_line(text))


def _parquet(records: Sequence[dict[str, Any]]) -> bytes:
    columns = pa.Table.from_pylist(_visible_records(records))
    known = pa.schema([f.with_type(pa.float64()) if pa.types.is_null(f.type) else f for f in columns.schema])
    buffer = pa.BufferOutputStream()
    pq.write_table(columns.cast(known), buffer)
    return bytes(buffer.getvalue())


def _visible_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{visible(name): _visible(value) for name, value in record.items()} for record in records]


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _markdown(table: Table) -> list[str]:
    rules = ["---"] * table.n_names + ["---:"] * (len(table.header) - table.n_names)
    lines = [_in_markdown(Cell(name)) for name in table.header], rules
    rows = [[_in_markdown(cell) for cell in row] for row in table.rows]
    title = [_in_markdown(Cell(table.title)), ""] if table.title else []
    legend = [line for text in table.legend for line in ("", _in_markdown(Cell(text)))]
    return [*title, *(f"| {' | '.join(cells)} |" for cells in (*lines, *rows)), *legend]


def _in_markdown(cell: Cell) -> str:
    text = _MARKDOWN.sub(r"\\\1", _in_one_line(cell))
    return f"**{text}**" if cell.is_best else text


def _latex(table: Table) -> list[str]:
    """A `tabular` for the package booktabs."""
    alignment = "l" * table.n_names + "r" * (len(table.header) - table.n_names)
    comments = [f"% {one_line(text)}" for text in (table.title, *table.legend) if text]
    rows = [[_in_latex(cell) for cell in row] for row in table.rows]
    header = [_in_latex(Cell(name)) for name in table.header]
    return [
        *comments,
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        rf"{' & '.join(header)} \\",
        r"\midrule",
        *(rf"{' & '.join(cells)} \\" for cells in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _in_latex(cell: Cell) -> str:
    text = _in_one_line(cell).translate(_LATEX)
    return rf"\textbf{{{text}}}" if cell.is_best else text


def _in_one_line(cell: Cell) -> str:
    """Headers have line breaks for the terminal."""
    return visible(" ".join(cell.text.split()))
