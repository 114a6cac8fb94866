"""The table of all trials: one row a trial, with its run directory."""

from adapt.across_runs.runs import Runs
from adapt.across_runs.table import Cell, Table, split_common
from adapt.report.comparison import UNKNOWN
from adapt.report.seed_averages import differing_by_method, label
from adapt.run_dir.results import Row, csv_record


def trial_table(runs: Runs) -> Table:
    """Settings and scores of every trial; the records have all fields of the rows, options and conditions as JSON."""
    in_label = differing_by_method(runs.rows)
    names = [
        {
            "run": str(runs.run_dirs[row.trial_id]),
            "dataset": row.dataset,
            "backbone": row.backbone,
            "method": label(row, in_label[row.method]),
        }
        for row in runs.rows
    ]
    title, keys = split_common(names)
    rows = [
        (*(Cell(of_row[key]) for key in keys), *_figures(row)) for of_row, row in zip(names, runs.rows, strict=True)
    ]
    return Table(
        title=title,
        header=(*keys, "seed", "learning rate", "weight decay", "validation %", "top-1 %", "mAP %", "trial"),
        n_names=len(keys),
        rows=tuple(rows),
        legend=(),
        records=tuple({"run_dir": str(runs.run_dirs[row.trial_id]), **csv_record(row)} for row in runs.rows),
    )


def _figures(row: Row) -> tuple[Cell, ...]:
    settings = [UNKNOWN if value is None else f"{value:g}" for value in (row.lr, row.weight_decay)]
    scores = [
        UNKNOWN if value is None else f"{value:.2f}" for value in (row.val_score, row.top1, row.mean_average_precision)
    ]
    return tuple(map(Cell, (str(row.seed), *settings, *scores, row.trial_id)))
