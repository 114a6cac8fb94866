"""Keeps one row a trained trial in `results.json` and `results.csv` of a run directory.

`results.json` is a list of objects, each with its own checksum: rows may be removed by hand, and their trials are then
trained again; a row with an edited value is refused. `results.csv` is for spreadsheets and is never read back: a text
that a spreadsheet would run as a formula gets a leading apostrophe.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from adapt.run_dir.files import parse_json, read_text, with_checksum, without_checksum, write_text
from adapt.run_dir.lock import open_locked
from store.errors import UserError

# Characters that begin a formula, from OWASP's list: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


@dataclass(frozen=True)
class Column:
    """How the report averages a field of `Row` over seeds, and the column that shows it.

    Args:
        name: first part of the header; empty for a field that is averaged but has no column.
        unit: second part of the header. `MiB`: the field holds bytes.
        average: over seeds: `mean_std` is mean and sample standard deviation, `first` is for values that do not
            depend on the seed.
        brief: whether the terminal shows the column too, or `report.html` alone.
    """

    name: str = ""
    unit: str = ""
    average: Literal["mean_std", "mean", "max", "first"] = "mean_std"
    brief: bool = False


class Row(BaseModel):
    """One trained trial. Metrics are in percent, of the test split except `val_score`; None where undefined.

    A new field with a `Column` appears in all files and tables; only the line that measures it has to be added.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    trial_id: str
    method: str
    options: dict[str, Any]
    searched: list[str] = []  # the options among whose values the search chose
    seed: int
    dataset: str
    backbone: str
    feature_source: str
    lr: float | None  # None, like `epochs`, for a method that is solved instead of trained step by step
    weight_decay: float
    epochs: int | None
    best_epoch: int  # of a solved method: the passes over the samples that it took
    val_score: Annotated[float | None, Column()]
    top1: Annotated[float | None, Column("top-1", "%")]
    top5: Annotated[float | None, Column("top-5", "%")]
    mean_class_accuracy: Annotated[float | None, Column("mean class", "%")]
    macro_f1: Annotated[float | None, Column("macro F1", "%")]
    mean_average_precision: Annotated[float | None, Column("mAP", "%")]
    trainable_params: Annotated[int, Column("trained", average="max", brief=True)]  # without the head
    head_params: Annotated[int, Column("head", average="max", brief=True)]
    seconds_per_epoch: Annotated[float | None, Column("s", "/epoch", "mean", brief=True)] = None
    samples_per_second: Annotated[float | None, Column("samples", "/s", "mean", brief=True)] = None
    peak_memory_bytes: Annotated[int | None, Column("peak", "MiB", "max", brief=True)] = None
    extract_seconds: Annotated[float | None, Column("extract", "s", "mean")] = None
    store_bytes: Annotated[int | None, Column("store", "MiB", "max")] = None
    break_even_epochs: Annotated[float | None, Column("break\neven", "epochs", "mean", brief=True)] = None
    # of one image, backbone included; a multiplication and an addition are two operations
    inference_gflops: Annotated[float | None, Column("GFLOPs", "/image", "first")] = None
    conditions: dict[str, Any] = {}  # see `adapt.report.fingerprint`

    @property
    def file_stem(self) -> str:
        """The name, without suffix, of the files that belong to this trial: its adaptor and its predictions."""
        return f"{self.method}-seed{self.seed}-{self.trial_id[:8]}"


def declared_columns(rows: type[Row]) -> dict[str, Column]:
    """The columns that a class of rows declares, by field."""
    return {
        name: column
        for name, field in rows.model_fields.items()
        for column in field.metadata
        if isinstance(column, Column)
    }


COLUMNS = declared_columns(Row)


def in_order(rows: Iterable[Row], methods: Sequence[str] = ()) -> list[Row]:
    """Rows by data set, backbone, method, options, conditions and seed: in any order of rows, the result is the same.

    Args:
        rows: rows of different trials.
        methods: names of methods in the order in which they come; others follow by name.
    """
    positions = {name: position for position, name in enumerate(dict.fromkeys(methods))}

    def key(row: Row) -> tuple[Any, ...]:
        method = (positions.get(row.method, len(positions)), row.method)
        settings = (_sort_key(row.options), _sort_key(row.conditions))
        return row.dataset, row.backbone, method, settings, row.seed, row.trial_id

    return sorted(rows, key=key)


def _sort_key(values: dict[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Options by name; numbers by value, before texts."""
    return [
        (name, False, float(value), "")
        if isinstance(value, int | float)
        else (name, True, 0.0, json.dumps(value, sort_keys=True))
        for name, value in sorted(values.items())
    ]


def write_results(run_dir: str | Path, rows: Iterable[Row]) -> None:
    """Merge rows into the files of `run_dir`: a row of the same trial is replaced, all others are kept."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Without the lock, jobs that finish at the same time would drop one another's rows.
    with open_locked(run_dir / ".results.lock", wait=True):
        old = read_results(run_dir) if (run_dir / "results.json").exists() else []
        merged = in_order({row.trial_id: row for row in [*old, *rows]}.values())
        write_text(run_dir / "results.json", _to_json(merged))
        write_csv(run_dir, merged)


def write_csv(run_dir: Path, rows: Sequence[Row]) -> None:
    """Write `results.csv` with these rows.

    Raises:
        JobError: the file cannot be written.
    """
    write_text(run_dir / "results.csv", _to_csv(rows))


def read_results(run_dir: str | Path) -> list[Row]:
    """All rows of a run, in the order of `in_order` if nobody has moved them.

    Raises:
        UserError: there are no results, or the file is damaged.
    """
    path = Path(run_dir) / "results.json"
    try:
        rows = TypeAdapter(list[Row]).validate_python(_verify_rows(parse_json(read_text(path))))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no results in {run_dir}: run `sidecache run` first") from None
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " -> ".join(str(part) for part in first["loc"]) or "top level"
        raise _damaged(path, f"{where}: {first['msg']}") from None
    except ValueError as error:  # not a regular file, not UTF-8, not JSON, or a checksum that does not match
        raise _damaged(path, str(error)) from None
    ids = [row.trial_id for row in rows]
    if len(set(ids)) < len(ids):
        raise _damaged(path, f"trial {statistics.mode(ids)!r} appears twice")
    return rows


def _verify_rows(document: Any) -> list[dict[str, Any]]:
    """The rows without their checksums, which are verified."""
    if not isinstance(document, list):
        raise ValueError("top level: not a list of rows")
    rows = []
    for number, row in enumerate(document):
        try:
            rows.append(without_checksum(row))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}): remove the damaged rows, or move the file away, and run `sidecache run` again, "
        "which trains what is missing"
    )


def _to_json(rows: Sequence[Row]) -> str:
    documents = [with_checksum(row.model_dump()) for row in rows]
    return json.dumps(documents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _to_csv(rows: Sequence[Row]) -> str:
    return csv_text(list(Row.model_fields), [csv_record(row) for row in rows])


def csv_record(row: Row) -> dict[str, Any]:
    """The fields of a row, with its options and conditions as JSON."""
    nested = {name: json.dumps(getattr(row, name), ensure_ascii=False) for name in ("options", "conditions")}
    return {**row.model_dump(), **nested}


def csv_text(names: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV with a header, in which no cell is run by a spreadsheet as a formula."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(name) for name in names])
    for record in records:
        writer.writerow([_cell(record[name]) for name in names])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Numbers stay numbers; an apostrophe keeps a spreadsheet from running a text as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
