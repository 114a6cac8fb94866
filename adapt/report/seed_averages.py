"""Rows over seeds: the mean and the spread of those that differ in nothing but their seed and what validation chose."""

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from adapt.run_dir.results import Row

Metric = Literal["val_score", "top1", "top5", "mean_class_accuracy", "macro_f1", "mean_average_precision"]
# Conditions: rows that differ in one were judged by other samples or another score, and are not to be compared.
JUDGED_BY = ("samples", "val_fraction", "balance_classes")


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; the latter is None for one seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Summary:
    """One method with one set of options on one dataset and backbone, under one set of conditions, over its seeds."""

    dataset: str
    backbone: str
    method: str
    options: dict[str, Any]
    label: str
    judged_by: dict[str, Any]
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


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Rows grouped by all but the seed and what validation chose, in the order in which groups first appear."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.dataset, row.backbone, row.method, _sorted_json(row.options), _sorted_json(row.conditions))
        groups.setdefault(key, []).append(row)
    shown = {method: names - {*JUDGED_BY} for method, names in differing_by_method(rows).items()}
    return [_summarize_group(_best_of_each_seed(group), shown[group[0].method]) for group in groups.values()]


def differing_by_method(rows: Iterable[Row]) -> dict[str, set[str]]:
    """By method, the options and conditions whose value (or presence) is not the same in all its rows."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    return {
        method: differing(row.options for row in group) | differing(row.conditions for row in group if row.conditions)
        for method, group in by_method.items()
    }


def differing(dicts: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names whose value, or presence, is not the same in all of them."""
    dicts = list(dicts)
    names = {name for values in dicts for name in values}
    return {name for name in names if len({(name in values, _sorted_json(values.get(name))) for values in dicts}) > 1}


def _sorted_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def label(row: Row, shown: Collection[str]) -> str:
    """A method's name and what tells it from its siblings: `losa rank=8 epochs=10`."""
    return " ".join([row.method, *pairs(row.options, shown), *pairs(row.conditions, shown)])


def pairs(values: Mapping[str, Any], shown: Collection[str]) -> list[str]:
    """`name=value` of those that are to be shown."""
    return [f"{name}={_plain(value)}" for name, value in values.items() if name in shown]


def _plain(value: Any) -> str:
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


def _summarize_group(rows: list[Row], shown: Collection[str]) -> Summary:
    first = rows[0]
    stats = {name: _stat(getattr(row, name) for row in rows) for name in get_args(Metric)}
    return Summary(
        dataset=first.dataset,
        backbone=first.backbone,
        method=first.method,
        options=first.options,
        label=label(first, shown),
        judged_by={name: first.conditions[name] for name in JUDGED_BY if name in first.conditions},
        seeds=tuple(sorted(row.seed for row in rows)),
        **stats,
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
