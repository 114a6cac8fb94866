"""One row a trained trial, kept in `results.json` and `results.csv` of a run directory.

`results.json` is a list of objects, each with a checksum of itself: a whole row may be taken out by hand, and its trial
is then trained again; a row of which a value was changed is refused. `results.csv` is for spreadsheets and never read
back: a text that one of them would run as a formula has an apostrophe in front.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from adapt.run_dir.files import parse_json, read_text, with_checksum, without_checksum, write_text
from adapt.run_dir.lock import open_locked
from store.errors import UserError

# What begins a formula, as OWASP lists it: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


class Row(BaseModel):
    """One trained trial. Metrics are in percent and, but for `val_score`, of the test split; None where undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    trial_id: str
    method: str
    options: dict[str, Any]
    seed: int
    dataset: str
    backbone: str
    feature_source: str
    lr: float | None  # None, as `epochs` is, where the method was solved and not trained step by step
    weight_decay: float
    epochs: int | None
    best_epoch: int  # of a solved method: the passes over the samples that it took
    val_score: float | None
    top1: float | None
    top5: float | None
    mean_class_accuracy: float | None
    macro_f1: float | None
    mean_average_precision: float | None
    trainable_params: int  # without the head
    head_params: int
    seconds_per_epoch: float | None = None
    samples_per_second: float | None = None
    peak_memory_bytes: int | None = None
    extract_seconds: float | None = None
    store_bytes: int | None = None
    break_even_epochs: float | None = None
    inference_gflops: float | None = None  # of one image, backbone included; multiplications and additions
    conditions: dict[str, Any] = {}  # see `adapt.report.fingerprint`


def write_results(run_dir: str | Path, rows: Iterable[Row]) -> None:
    """Merge rows into the files of `run_dir`: the same trial is replaced where it stands, every other row is kept."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Workers that finish together would read the same old rows, and the last one would drop the others' new ones.
    with open_locked(run_dir / ".results.lock", wait=True):
        old = read_results(run_dir) if (run_dir / "results.json").exists() else []
        merged = list({row.trial_id: row for row in [*old, *rows]}.values())
        as_json, as_csv = _to_json(merged), _to_csv(merged)
        write_text(run_dir / "results.json", as_json)
        write_text(run_dir / "results.csv", as_csv)


def read_results(run_dir: str | Path) -> list[Row]:
    """All rows of a run, in the order in which their trials were first written.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = Path(run_dir) / "results.json"
    try:
        rows = TypeAdapter(list[Row]).validate_python(_checked(parse_json(read_text(path))))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no results in {run_dir}: run `sidecache run` first") from None
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " -> ".join(str(part) for part in first["loc"]) or "top level"
        raise _damaged(path, f"{where}: {first['msg']}") from None
    except ValueError as error:  # no regular file, not UTF-8, not JSON, or not what was written
        raise _damaged(path, str(error)) from None
    ids = [row.trial_id for row in rows]
    if len(set(ids)) < len(ids):
        raise _damaged(path, f"trial {statistics.mode(ids)!r} is there twice")
    return rows


def _checked(document: Any) -> Any:
    """The rows without their checksums."""
    if not isinstance(document, list):
        raise ValueError("top level: it is no list of rows")
    rows = []
    for number, row in enumerate(document):
        try:
            rows.append(without_checksum(row))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}): take damaged rows out, or move it away, and run `sidecache run` again, which "
        "trains what is missing"
    )


def _to_json(rows: Sequence[Row]) -> str:
    documents = [with_checksum(row.model_dump()) for row in rows]
    return json.dumps(documents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _to_csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {name: json.dumps(getattr(row, name), ensure_ascii=False) for name in ("options", "conditions")}
        writer.writerow({name: _cell(value) for name, value in {**row.model_dump(), **nested}.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Numbers stay numbers; a text that a spreadsheet would run is shown instead."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
