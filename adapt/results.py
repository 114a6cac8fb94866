"""One row a trained trial, kept in `results.json` and `results.csv` of a run directory; their summary over seeds."""

import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from adapt.run_files import write_text
from store.errors import UserError

Metric = Literal["val_score", "top1", "top5", "mean_class_accuracy", "macro_f1", "mean_average_precision"]


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
    best_epoch: int  # of a solved method: the iterations that it took
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


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; the latter is None for one seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Summary:
    """One method with one set of options on one dataset and backbone, over its seeds."""

    dataset: str
    backbone: str
    method: str
    options: dict[str, Any]
    label: str
    seeds: tuple[int, ...]
    val_score: Stat | None
    top1: Stat | None
    top5: Stat | None
    mean_class_accuracy: Stat | None
    macro_f1: Stat | None
    mean_average_precision: Stat | None
    trainable_params: int
    head_params: int
    seconds_per_epoch: float | None
    samples_per_second: float | None
    peak_memory_bytes: int | None
    extract_seconds: float | None
    store_bytes: int | None
    break_even_epochs: float | None
    inference_gflops: float | None


def write_results(run_dir: str | Path, rows: Iterable[Row]) -> None:
    """Merge rows into the files of `run_dir`: the same trial is replaced where it stands, every other row is kept."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir):
        old = read_results(run_dir) if (run_dir / "results.json").exists() else []
        merged = list({row.trial_id: row for row in [*old, *rows]}.values())
        as_json, as_csv = _to_json(merged), _to_csv(merged)
        write_text(run_dir / "results.json", as_json)
        write_text(run_dir / "results.csv", as_csv)


def read_results(run_dir: str | Path) -> list[Row]:
    """All rows of a run, in the order in which their trials were first written."""
    path = Path(run_dir) / "results.json"
    try:
        rows = TypeAdapter(list[Row]).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no results in {run_dir}: run `sidecache run` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " -> ".join(str(part) for part in first["loc"]) or "top level"
        raise _damaged(path, f"{where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise _damaged(path, str(error)) from None
    ids = [row.trial_id for row in rows]
    if len(set(ids)) < len(ids):
        raise _damaged(path, f"trial {statistics.mode(ids)!r} is there twice")
    return rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): repair it, or move it away and run `sidecache run` again")


def _to_json(rows: Sequence[Row]) -> str:
    return json.dumps([row.model_dump() for row in rows], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _to_csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row.model_dump(), "options": json.dumps(row.options, ensure_ascii=False)})
    return buffer.getvalue()


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Workers that finish together would read the same old rows, and the last one would drop the others' new ones."""
    with (run_dir / ".results.lock").open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Rows grouped by (dataset, backbone, method, options) over seeds, in the order in which groups first appear."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row.dataset, row.backbone, row.method, _sorted_json(row.options))
        groups.setdefault(key, []).append(row)
    differing = differing_options(rows)
    return [_summarise_group(_best_of_each_seed(group), differing) for group in groups.values()]


def differing_options(rows: Iterable[Row]) -> dict[str, set[str]]:
    """By method, the options whose value (or presence) is not the same in all its rows."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row.options)
    return {method: _differing(options) for method, options in by_method.items()}


def _differing(all_options: list[dict[str, Any]]) -> set[str]:
    names = {name for options in all_options for name in options}
    return {name for name in names if len({(name in o, _sorted_json(o.get(name))) for o in all_options}) > 1}


def _sorted_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def label(method: str, options: dict[str, Any], shown: set[str]) -> str:
    """A method's name and those of its options that tell it from its siblings: `losa rank=8`."""
    return " ".join([method, *(f"{name}={_plain(value)}" for name, value in options.items() if name in shown)])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _best_of_each_seed(rows: list[Row]) -> list[Row]:
    """A seed trained with several learning rates counts once: by the best validation score, the last of equals."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.seed not in best or _rank(row) >= _rank(best[row.seed]):
            best[row.seed] = row
    return list(best.values())


def _rank(row: Row) -> float:
    return float("-inf") if row.val_score is None else row.val_score


def _summarise_group(rows: list[Row], differing: dict[str, set[str]]) -> Summary:
    first = rows[0]
    return Summary(
        dataset=first.dataset,
        backbone=first.backbone,
        method=first.method,
        options=first.options,
        label=label(first.method, first.options, differing[first.method]),
        seeds=tuple(sorted(row.seed for row in rows)),
        val_score=_stat(row.val_score for row in rows),
        top1=_stat(row.top1 for row in rows),
        top5=_stat(row.top5 for row in rows),
        mean_class_accuracy=_stat(row.mean_class_accuracy for row in rows),
        macro_f1=_stat(row.macro_f1 for row in rows),
        mean_average_precision=_stat(row.mean_average_precision for row in rows),
        trainable_params=max(row.trainable_params for row in rows),
        head_params=max(row.head_params for row in rows),
        seconds_per_epoch=_mean(row.seconds_per_epoch for row in rows),
        samples_per_second=_mean(row.samples_per_second for row in rows),
        peak_memory_bytes=_max(row.peak_memory_bytes for row in rows),
        extract_seconds=_mean(row.extract_seconds for row in rows),
        store_bytes=_max(row.store_bytes for row in rows),
        inference_gflops=rows[0].inference_gflops,
        break_even_epochs=_mean(row.break_even_epochs for row in rows),
    )


def _stat(values: Iterable[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _max(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
