"""The tidy table: one row a group, which is a data set, a backbone, a protocol and a method with its options."""

import json
from collections.abc import Sequence
from typing import Any

from adapt.across_runs.table import Cell, Table, split_common
from adapt.report.comparison import UNKNOWN, Comparison, interval_text, percent
from adapt.report.comparison import legend as legend_of
from adapt.report.seed_averages import Summary
from adapt.report.table import table_column

_COSTS = ("trainable_params", "seconds_per_epoch", "peak_memory_bytes")  # that readers see; records have all
Entry = tuple[Comparison, Summary]


def group_table(comparisons: Sequence[Comparison]) -> Table:
    """Mean, deviation over seeds, interval and costs of every group."""
    entries = [(comparison, summary) for comparison in comparisons for summary in comparison.summaries]
    title, keys = split_common([{**names_of(comparison), "method": ""} for comparison, _ in entries])
    columns = {
        table_column(field).header: [table_column(field).cell(summary) for _, summary in entries] for field in _COSTS
    }
    columns = {header: cells for header, cells in columns.items() if any(cell != UNKNOWN for cell in cells)}
    rows = [
        (
            *(Cell(names_of(comparison)[key]) for key in keys),
            *_figures(comparison, summary),
            *(Cell(cells[position]) for cells in columns.values()),
        )
        for position, (comparison, summary) in enumerate(entries)
    ]
    return Table(
        title=title,
        header=(*keys, "method", "test\n%", "95 % CI\n%", "seeds", *columns),
        n_names=len(keys) + 1,
        rows=tuple(rows),
        legend=legend(comparisons),
        records=tuple(_record(*entry) for entry in entries),
    )


def names_of(comparison: Comparison) -> dict[str, str]:
    """What a comparison is of, by the header of the column that shows it."""
    return {
        "dataset": comparison.dataset,
        "backbone": comparison.backbone,
        "protocol": comparison.protocol,
        "metric": comparison.metric_name,
    }


def legend(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """What marks and figures of these comparisons mean."""
    lines = ["mean ± sample standard deviation over seeds, test split; bold: the best on validation"]
    lines += [line for comparison in comparisons for line in legend_of(comparison)]
    return tuple(dict.fromkeys(lines))


def _figures(comparison: Comparison, summary: Summary) -> tuple[Cell, ...]:
    return (
        Cell(summary.label),
        Cell(percent(comparison.stat(summary)), is_best=summary == comparison.best),
        Cell(interval_text(comparison, summary)),
        Cell(str(len(summary.seeds))),
    )


def _record(comparison: Comparison, summary: Summary) -> dict[str, Any]:
    stat, evidence = comparison.stat(summary), comparison.evidence.get(summary.trial_ids)
    record: dict[str, Any] = {
        "dataset": comparison.dataset,
        "backbone": comparison.backbone,
        "protocol": comparison.protocol,
        "method": summary.method,
        "label": summary.label,
        "options": json.dumps(summary.options, ensure_ascii=False),
        "metric": comparison.metric,
        "mean": stat.mean if stat else None,
        "std": stat.std if stat else None,
        "low": evidence.interval.low if evidence else None,
        "high": evidence.interval.high if evidence else None,
        "is_best": summary == comparison.best,
        "p_value": evidence.p_value if evidence else None,
        "is_inside_noise": comparison.is_inside_noise(summary),
        "n_seeds": len(summary.seeds),
        "seeds": " ".join(map(str, summary.seeds)),
    }
    for field, found in summary.metrics.items():
        record |= {field: found.mean if found else None, f"{field}_std": found.std if found else None}
    return record | summary.costs
