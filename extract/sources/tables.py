"""Lists the samples of a table: a CSV or Parquet file with the columns `path`, `label` or `labels`, maybe `split`.

`data.label_column` may name another column than `label`. A table of videos may have the columns `start` and `end`, in
seconds, whose cells may be empty: such a sample is a part of the file, and its id ends in `#start-end`.
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from pyarrow import parquet

from extract.config import DataConfig
from extract.sources.data_root import root_file
from extract.sources.samples import IMAGES, FileKind, Sample, SourceSamples
from extract.sources.splits import TRAIN, choose_splits
from store.errors import UserError

SEPARATOR = "|"
MAX_PATH, MAX_LABEL = 4096, 1000  # characters
_BATCH_ROWS = 1024
_OTHER_SEPARATORS = (";", "\t", "|")
_KNOWN_COLUMNS = ("path", "labels", "split")
_PART_COLUMNS = ("start", "end")
_NEGATIVE = re.compile(r"-\d+")

Row = tuple[str, Mapping[str, Any]]  # its place, for messages, and its cells by column


def list_csv(config: DataConfig, kind: FileKind = IMAGES) -> SourceSamples:
    """All samples of the CSV file `data.root`."""
    path = root_file(config)
    lines = _csv_lines(path)
    _, header = next(lines, ("", []))
    columns = [name.strip() for name in header]
    _check_columns(path, columns, config.label_column)
    return _Table(path, columns, kind).list_samples(config, _csv_rows(columns, lines))


def list_parquet(config: DataConfig) -> SourceSamples:
    """All samples of the Parquet file `data.root`."""
    path = root_file(config)
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            _check_columns(path, columns, config.label_column)
            return _Table(path, columns, IMAGES).list_samples(config, _parquet_rows(path, file, config.label_column))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be read as a Parquet file: {error}; write it again, or use csv") from error


def _parquet_rows(path: Path, file: Any, label_column: str) -> Iterator[Row]:
    """Read in batches: a file of a few kilobytes may claim a billion rows, and the first faulty row ends it."""
    used = {*_KNOWN_COLUMNS, label_column}.intersection(file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=sorted(used)):
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
                f"{place} has {len(cells)} cells, but the header has {len(columns)} ({', '.join(columns)}); "
                "correct the line, and quote cells that hold a comma"
            )
        yield place, dict(zip(columns, cells, strict=True))


def _check_columns(path: Path, columns: Sequence[str], label: str) -> None:
    legal = f"legal: path, then {label} or labels (several, separated by {SEPARATOR!r}), and optionally split"
    if label in (*_KNOWN_COLUMNS, *_PART_COLUMNS):
        raise UserError(f"data.label_column is {label!r}, which has another meaning; name the column of the class")
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


@dataclass(frozen=True)
class _Table:
    """Turns the rows of a table into samples."""

    path: Path
    columns: Sequence[str]
    kind: FileKind

    def list_samples(self, config: DataConfig, rows: Iterable[Row]) -> SourceSamples:
        multi_label, folder = "labels" in self.columns, self.path.parent.resolve()
        splits: dict[str, list[Sample]] = {}
        places: dict[str, str] = {}
        for place, cells in rows:
            if multi_label:
                labels = _parse_labels(cells["labels"], place)
            else:
                labels = (label_text(cells[config.label_column], place),)
            sample = self._sample(folder, place, cells, labels)
            if sample.id in places:
                raise UserError(f"{place} names {sample.id!r}, as does {places[sample.id]}; remove one of them")
            places[sample.id] = place
            split = _parse_split(place, cells) if "split" in self.columns else TRAIN
            splits.setdefault(split, []).append(sample)
        if not places:
            raise UserError(f"{self.path} lists no samples; add a line for each of the {self.kind.plural}")
        chosen = choose_splits(splits if "split" in self.columns else (), config)
        return SourceSamples(
            name=f"{folder.name}-{self.path.stem}",
            train=splits[TRAIN],
            test=None if chosen.test is None else splits[chosen.test],
            validation=() if chosen.validation is None else splits[chosen.validation],
            multi_label=multi_label,
        )

    def _sample(self, folder: Path, place: str, cells: Mapping[str, Any], labels: tuple[str, ...]) -> Sample:
        file = _resolve(folder, place, cells["path"])
        file_id = file.relative_to(folder).as_posix()
        start, end = _parse_part(place, cells) if self.kind.has_parts else (None, None)
        if start is None and end is None:
            return Sample(file_id, labels, self.kind.content(str(file)))
        content = self.kind.content(str(file), start=start, end=end)
        return Sample(f"{file_id}#{_short(start)}-{_short(end)}", labels, content, part_of=file_id)


def _parse_labels(cell: Any, place: str) -> tuple[str, ...]:
    parts = cell.split(SEPARATOR) if isinstance(cell, str) else cell
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{place}: labels is {brief(cell)}; legal: one or more labels, separated by {SEPARATOR!r}")
    return tuple(dict.fromkeys(label_text(part, place) for part in parts))


def _parse_part(place: str, cells: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Start and end in seconds; None where the column or its cell is missing."""
    start, end = (_parse_seconds(place, name, cells.get(name, "").strip()) for name in _PART_COLUMNS)
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{place}: end is {_short(end)}, not after start, {_short(start or 0.0)}; correct the line")
    return start, end


def _parse_seconds(place: str, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0.0):
        raise UserError(f"{place}: {name} is {brief(text)}; legal: seconds from 0 on, such as 12.5, or an empty cell")
    return seconds


def _short(seconds: float | None) -> str:
    return "" if seconds is None else str(seconds).removesuffix(".0")


def _resolve(folder: Path, place: str, cell: Any) -> Path:
    """The file that a cell names. It must be in the table's folder once `..` and links are resolved."""
    if not isinstance(cell, str) or not cell or "\0" in cell:
        raise UserError(f"{place}: path is {brief(cell)}; legal: a file, relative to {folder}")
    if len(cell) > MAX_PATH:
        raise UserError(f"{place}: path has {len(cell):,} characters; legal: at most {MAX_PATH:,}")
    file = folder / cell
    if not _real_path(file).is_relative_to(folder):
        raise UserError(f"{place}: the path {cell!r} leads out of the table's folder {folder}; move the file into it")
    if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
        raise UserError(f"{place}: the file {cell!r} does not exist in {folder}; correct the path or remove the line")
    # One spelling for each file. A link keeps its name if the path is plain.
    return _real_path(file) if Path(cell).is_absolute() or ".." in file.parts else file


def _real_path(file: Path) -> Path:
    """Without `..` and links. Unlike Path.resolve, it does not raise for circular links, which are no files anyway."""
    return Path(os.path.realpath(file))


def _parse_split(place: str, cells: Mapping[str, Any]) -> str:
    split = cells["split"]
    if not isinstance(split, str) or not 0 < len(split.strip()) <= MAX_LABEL:
        raise UserError(f"{place}: split is {brief(split)}; legal: a name such as train or test")
    return split.strip()


def label_text(label: Any, place: str) -> str:
    """A label as text.

    Args:
        label: text or an integer from 0 on.
        place: of the label, for messages.

    Raises:
        UserError: the label is empty, negative, too long or of another type.
    """
    text = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
    if not isinstance(text, str):
        raise UserError(f"{place}: the label is {brief(label)}; legal: text or an integer from 0 on")
    text = text.strip()
    if not text:
        raise UserError(f"{place}: the label is empty; add one, or remove the sample")
    if len(text) > MAX_LABEL:
        raise UserError(f"{place}: the label has {len(text):,} characters; legal: at most {MAX_LABEL:,}")
    if _NEGATIVE.fullmatch(text):
        raise UserError(f"{place}: the label is {text}; integer labels start at 0, remove samples without a class")
    return text
