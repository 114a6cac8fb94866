"""The pivot: methods against data sets, or another pair."""

from collections.abc import Sequence
from typing import Any, Literal

from adapt.across_runs.groups import Entry, legend
from adapt.across_runs.table import Cell, Table, split_common
from adapt.report.comparison import INSIDE_NOISE, INTERVAL_LEGEND, UNKNOWN, Comparison, percent

By = Literal["dataset", "backbone", "method"]


def pivot_table(comparisons: Sequence[Comparison], by: By) -> Table:
    """Means of the metric with one column a data set, backbone or method.

    Args:
        comparisons: what is shown.
        by: what the columns are; the rows are the others.
    """
    entries = [(comparison, summary) for comparison in comparisons for summary in comparison.summaries]
    names = [_names(*entry, has_one_metric=len({c.metric for c in comparisons}) == 1) for entry in entries]
    columns = list(dict.fromkeys(of_entry[by] for of_entry in names))
    title, keys = split_common([{key: name for key, name in of_entry.items() if key != by} for of_entry in names])
    keys = keys or ["dataset" if by == "method" else "method"]  # one row still has a name
    places: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry, of_entry in zip(entries, names, strict=True):
        places.setdefault(tuple(of_entry[key] for key in keys), {})[of_entry[by]] = entry
    return Table(
        title=title,
        header=(*keys, *columns),
        n_names=len(keys),
        rows=tuple(
            (*map(Cell, of_row), *(_cell(cells.get(column)) for column in columns)) for of_row, cells in places.items()
        ),
        legend=tuple(line for line in legend(comparisons) if line != INTERVAL_LEGEND),
        records=tuple(
            _record(dict(zip(keys, of_row, strict=True)), cells, columns) for of_row, cells in places.items()
        ),
    )


def _names(comparison: Comparison, summary: Any, has_one_metric: bool) -> dict[str, str]:
    dataset = f"{comparison.dataset} ({comparison.protocol})" if comparison.protocol else comparison.dataset
    names = {"dataset": dataset, "backbone": comparison.backbone, "method": summary.label}
    if has_one_metric:
        return {"metric": f"{comparison.metric_name} %", **names}
    return {**names, "dataset": f"{dataset}, {comparison.metric_name} %"}


def _cell(entry: Entry | None) -> Cell:
    if entry is None:
        return Cell(UNKNOWN)
    comparison, summary = entry
    mark = f" {INSIDE_NOISE}" if comparison.is_inside_noise(summary) else ""
    return Cell(percent(comparison.stat(summary)) + mark, is_best=summary == comparison.best)


def _record(names: dict[str, str], cells: dict[str, Entry], columns: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = dict(names)
    for column in columns:
        comparison, summary = cells.get(column, (None, None))
        stat = comparison.stat(summary) if comparison and summary else None
        is_inside = comparison.is_inside_noise(summary) if comparison and summary else None
        record |= {
            column: stat.mean if stat else None,
            f"{column} std": stat.std if stat else None,
            f"{column} is_inside_noise": is_inside,
        }
    return record
