"""Samples named by a list: a CSV or Parquet file with the columns `path`, `label` or `labels`, and perhaps `split`.

`data.label_column` may name another column than `label`. A list of videos may have the columns `start` and `end`, in
seconds, either of which may be blank: such a sample is a part of the file, and its id ends with `#start-end`.
"""

import csv
import importlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from extract.config import DataConfig
from extract.sources.samples import IMAGES, TRAIN, Listing, Medium, Sample, choose_test, root_file
from store.errors import UserError

SEPARATOR = "|"
LONGEST_PATH, LONGEST_LABEL = 4096, 1000  # characters
_ROWS_AT_ONCE = 1024
_OTHER_SEPARATORS = (";", "\t", "|")
_KNOWN = ("path", "labels", "split")
_PART = ("start", "end")
_NEGATIVE = re.compile(r"-\d+")

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its cells by column


def list_csv(config: DataConfig, medium: Medium = IMAGES) -> Listing:
    path = root_file(config)
    lines = _csv_lines(path)
    _, header = next(lines, ("", []))
    columns = [name.strip() for name in header]
    _check_columns(path, columns, config.label_column)
    return _list_rows(config, path, columns, _csv_rows(columns, lines), medium)


def list_parquet(config: DataConfig) -> Listing:
    path = root_file(config)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("source parquet needs pyarrow; install it with: pip install 'sidecache[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            _check_columns(path, columns, config.label_column)
            return _list_rows(config, path, columns, _parquet_rows(path, file, config.label_column), IMAGES)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be read as a Parquet file: {error}; write it again, or use csv") from error


def _parquet_rows(path: Path, file: Any, label: str) -> Iterator[Row]:
    """Row by row: a file of a few kilobytes may claim a billion of them, and the first that is at fault ends it."""
    known = {*_KNOWN, label}.intersection(file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=sorted(known)):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for row in range(batch.num_rows):
            number += 1
            yield f"{path}, row {number}", {name: column[row].as_py() for name, column in columns.items()}


def _csv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The lines that are not blank, each with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield f"{path}, line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}; correct the line") from error


def _csv_rows(columns: Sequence[str], lines: Iterable[tuple[str, list[str]]]) -> Iterator[Row]:
    for place, cells in lines:
        if len(cells) != len(columns):
            raise UserError(
                f"{place} has {len(cells)} cells where the header has {len(columns)} ({', '.join(columns)}); "
                "correct the line, with quotes around a cell that holds a comma"
            )
        yield place, dict(zip(columns, cells, strict=True))


def _check_columns(path: Path, columns: Sequence[str], label: str) -> None:
    legal = f"it wants path, then {label} or labels (several, separated by {SEPARATOR!r}), and optionally split"
    if label in (*_KNOWN, *_PART):
        raise UserError(f"data.label_column is {label!r}, which has a meaning of its own; name the column of the class")
    if not columns:
        raise UserError(f"{path} is empty; {legal}")
    found = f"the columns of {path} are {', '.join(columns)}"
    if len(set(columns)) < len(columns):
        raise UserError(f"{found}: one occurs twice; {legal}")
    if "path" not in columns or not {label, "labels"}.intersection(columns):
        separators = [sign for sign in _OTHER_SEPARATORS if len(columns) == 1 and sign in columns[0]]
        hint = f". The file seems to be separated by {separators[0]!r}; save it with commas" if separators else ""
        raise UserError(f"{found}; {legal}. data.label_column names the column of the class{hint}")
    if {label, "labels"}.issubset(columns):
        raise UserError(f"{found}: both {label} and labels; keep one of them")


def _list_rows(config: DataConfig, path: Path, columns: Sequence[str], rows: Iterable[Row], medium: Medium) -> Listing:
    multi_label = "labels" in columns
    splits: dict[str, list[Sample]] = {}
    seen: dict[str, str] = {}
    folder = path.parent.resolve()
    for place, cells in rows:
        labels = _several(place, cells["labels"]) if multi_label else (label_text(cells[config.label_column], place),)
        sample = _sample(folder, place, cells, labels, medium)
        if sample.id in seen:
            raise UserError(f"{place} names {sample.id!r}, as {seen[sample.id]} does already; remove one of the two")
        seen[sample.id] = place
        splits.setdefault(_split(place, cells) if "split" in columns else TRAIN, []).append(sample)
    if not seen:
        raise UserError(f"{path} lists no samples; add a line for each of the {medium.noun}")
    test = choose_test(splits if "split" in columns else (), config)
    return Listing(
        name=f"{folder.name}-{path.stem}",
        train=splits[TRAIN],
        test=None if test is None else splits[test],
        multi_label=multi_label,
    )


def _sample(folder: Path, place: str, cells: Mapping[str, Any], labels: tuple[str, ...], medium: Medium) -> Sample:
    file = _inside(folder, place, cells["path"])
    sample_id = file.relative_to(folder).as_posix()
    if not medium.has_parts:
        return Sample(sample_id, labels, medium.content(str(file)))
    start, end = _part(place, cells)
    if start is not None or end is not None:
        part = f"{sample_id}#{_short(start)}-{_short(end)}"
        return Sample(part, labels, medium.content(str(file), start=start, end=end), part_of=sample_id)
    return Sample(sample_id, labels, medium.content(str(file)))


def _several(place: str, given: Any) -> tuple[str, ...]:
    parts = given.split(SEPARATOR) if isinstance(given, str) else given
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{place}: labels is {brief(given)}; it wants one or more labels, separated by {SEPARATOR!r}")
    return tuple(dict.fromkeys(label_text(part, place) for part in parts))


def _part(place: str, cells: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Seconds; None where the column or its cell is missing."""
    start, end = (_seconds(place, name, cells.get(name, "").strip()) for name in _PART)
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{place}: end is {_short(end)}, not after start, {_short(start or 0.0)}; correct the line")
    return start, end


def _seconds(place: str, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0.0):
        raise UserError(f"{place}: {name} is {brief(text)}; it wants seconds from 0 on, such as 12.5, or nothing")
    return seconds


def _short(seconds: float | None) -> str:
    return "" if seconds is None else str(seconds).removesuffix(".0")


def _inside(folder: Path, place: str, given: Any) -> Path:
    """The file that a cell names, which must lie in the list's folder once `..` and links are followed."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise UserError(f"{place}: path is {brief(given)}; it wants a file, relative to {folder}")
    if len(given) > LONGEST_PATH:
        raise UserError(f"{place}: path has {len(given):,} characters; legal: at most {LONGEST_PATH:,}")
    file = folder / given
    if not _follow(file).is_relative_to(folder):
        raise UserError(f"{place}: the path {given!r} leads out of the list's folder {folder}; move the file into it")
    if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
        raise UserError(f"{place}: the file {given!r} does not exist in {folder}; correct the path or remove the line")
    # One spelling for each file. A link keeps its own name where the path is plain.
    return _follow(file) if Path(given).is_absolute() or ".." in file.parts else file


def _follow(file: Path) -> Path:
    """Without `..` and links; unlike Path.resolve, links in a circle are no error, for is_file then says no."""
    return Path(os.path.realpath(file))


def _split(place: str, cells: Mapping[str, Any]) -> str:
    split = cells["split"]
    if not isinstance(split, str) or not 0 < len(split.strip()) <= LONGEST_LABEL:
        raise UserError(f"{place}: split is {brief(split)}; it wants a name such as train or test")
    return split.strip()


def label_text(given: Any, place: str) -> str:
    """A label as text; `place` begins the message if it is none."""
    text = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(text, str):
        raise UserError(f"{place}: the label is {brief(given)}; a label is text or an integer from 0 on")
    text = text.strip()
    if not text:
        raise UserError(f"{place}: the label is empty; give one, or remove the sample")
    if len(text) > LONGEST_LABEL:
        raise UserError(f"{place}: the label has {len(text):,} characters; legal: at most {LONGEST_LABEL:,}")
    if _NEGATIVE.fullmatch(text):
        raise UserError(f"{place}: the label is {text}; integer labels start at 0, remove samples without a class")
    return text
