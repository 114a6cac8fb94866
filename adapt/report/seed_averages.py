"""Averages result rows over seeds.

Rows of the same data set, backbone, method, options and conditions form a group. A group may hold several learning
rates or weight decays of a seed; the one with the best validation score counts.
"""

import json
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapt.report.fingerprint import READABLE
from adapt.run_dir.results import COLUMNS, Row, in_order

# Conditions that define the evaluation: results that differ in one of them are not comparable.
PROTOCOL = ("samples", "val_fraction", "shots", "fraction", "refit", "balance_classes")


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; the latter is None for one seed."""

    mean: float
    std: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One group of rows, averaged over its seeds.

    Args:
        label: the method, with the options and conditions in which it differs from others of its data set and backbone;
            options that a search chose are named `searched`, whatever it chose, unless two groups then had one name.
        protocol: the conditions named in `PROTOCOL`.
        rows: one a seed, by seed.
        metrics: columns with a mean and a deviation, by field of `Row`; None where undefined.
        costs: the other columns, by field of `Row`; None where unknown.
    """

    dataset: str
    backbone: str
    method: str
    options: dict[str, Any]
    label: str
    protocol: dict[str, Any]
    rows: tuple[Row, ...]
    metrics: dict[str, Stat | None]
    costs: dict[str, int | float | None]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(row.seed for row in self.rows)

    @property
    def trial_ids(self) -> tuple[str, ...]:
        """The ids of its trials, which identify it among others."""
        return tuple(row.trial_id for row in self.rows)

    @property
    def trainable_params(self) -> int:
        """The number of trained parameters, without the head."""
        return int(self.costs["trainable_params"] or 0)


def summarize(rows: Sequence[Row], methods: Sequence[str] = ()) -> list[Summary]:
    """Group rows and average each group over its seeds, in an order that does not depend on the order of the rows.

    Args:
        rows: of any number of data sets and backbones.
        methods: names of methods in the order in which they are shown; others follow by name.
    """
    of_dataset: dict[tuple[str, str], list[Row]] = {}
    for row in in_order(rows, methods):
        of_dataset.setdefault((row.dataset, row.backbone), []).append(row)
    return [summary for group in of_dataset.values() for summary in _summarize_dataset(group)]


def _summarize_dataset(rows: list[Row]) -> list[Summary]:
    """The groups of one data set and backbone."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.method, _sorted_json(row.options), _sorted_json(row.conditions))
        groups.setdefault(key, []).append(row)
    found = [_best_of_each_seed(group) for group in groups.values()]
    return [_summarize_group(group, name) for group, name in zip(found, _names(rows, found), strict=True)]


def _names(rows: list[Row], groups: Sequence[list[Row]]) -> list[str]:
    """What the groups of one data set and backbone are called, without the conditions of their protocol."""
    as_searched, as_chosen = (differing_by_method(rows, searched) for searched in (True, False))
    firsts = [group[0] for group in groups]
    names = [label(row, as_searched[row.method] - {*PROTOCOL}, searched=True) for row in firsts]
    taken = Counter((name, _sorted_json(_protocol(row))) for name, row in zip(names, firsts, strict=True))
    return [
        name if taken[name, _sorted_json(_protocol(row))] == 1 else label(row, as_chosen[row.method] - {*PROTOCOL})
        for name, row in zip(names, firsts, strict=True)
    ]


def _protocol(row: Row) -> dict[str, Any]:
    return {name: row.conditions[name] for name in PROTOCOL if name in row.conditions}


def differing_by_method(rows: Iterable[Row], searched: bool = False) -> dict[str, set[str]]:
    """Names of the options and conditions that are not the same in all rows of a method, by method.

    Args:
        rows: rows of any methods.
        searched: whether an option that a search chose counts as equal in all rows that it was chosen for.
    """
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    return {
        method: differing(_options(row, searched) for row in group)
        | _differing_conditions([row.conditions for row in group if row.conditions])
        for method, group in by_method.items()
    }


def _differing_conditions(conditions: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the conditions that differ, without a digest that readable ones explain."""
    names = differing(conditions)
    readable = names.intersection(READABLE)
    digests: dict[str, set[str]] = {}
    for one in conditions:
        digests.setdefault(_sorted_json({name: one.get(name) for name in readable}), set()).add(
            str(one.get("features"))
        )
    is_explained = bool(readable) and all(len(found) == 1 for found in digests.values())
    return names - {"features"} if is_explained else names


def _options(row: Row, searched: bool) -> dict[str, Any]:
    """The options of a row, with `searched` in place of those that a search chose, if asked for."""
    return {name: "searched" if searched and name in row.searched else value for name, value in row.options.items()}


def differing(dicts: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names whose value is not the same in all dicts, or that some lack."""
    dicts = list(dicts)
    names = {name for values in dicts for name in values}
    return {name for name in names if len({(name in values, _sorted_json(values.get(name))) for values in dicts}) > 1}


def _sorted_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def label(row: Row, names: Collection[str], searched: bool = False) -> str:
    """A method with its options and conditions of these names: `losa rank=8 epochs=10`, or `rank=searched`."""
    options = name_value_pairs(_options(row, searched), names)
    return " ".join([row.method, *options, *name_value_pairs(row.conditions, names)])


def name_value_pairs(values: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """`name=value` for each of these names that has a value."""
    return [f"{name}={_plain(value)}" for name, value in values.items() if name in names]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _best_of_each_seed(rows: list[Row]) -> list[Row]:
    """One row a seed: that with the best validation score; of equal ones the last."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.seed not in best or _rank(row) >= _rank(best[row.seed]):
            best[row.seed] = row
    return [best[seed] for seed in sorted(best)]


def _rank(row: Row) -> float:
    return float("-inf") if row.val_score is None else row.val_score


def _summarize_group(rows: list[Row], name: str) -> Summary:
    first = rows[0]
    values = {field: [getattr(row, field) for row in rows] for field in COLUMNS}
    return Summary(
        dataset=first.dataset,
        backbone=first.backbone,
        method=first.method,
        options=first.options,
        label=name,
        protocol=_protocol(first),
        rows=tuple(rows),
        metrics={field: _stat(values[field]) for field, column in COLUMNS.items() if column.average == "mean_std"},
        costs={
            field: _average(column.average, values[field])
            for field, column in COLUMNS.items()
            if column.average != "mean_std"
        },
    )


def _stat(values: Iterable[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _average(how: str, values: Sequence[int | float | None]) -> int | float | None:
    if how == "first":
        return values[0]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known) if how == "mean" else max(known)
