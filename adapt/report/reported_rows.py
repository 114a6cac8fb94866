"""Holds the rows that a table or a report shows, and where their predictions are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapt.report.comparison import Comparison, comparisons_of
from adapt.report.seed_averages import differing_by_method, label, summarize
from adapt.run_dir.job_record import JobRecord, read_job_record
from adapt.run_dir.predictions import Predictions, find_predictions
from adapt.run_dir.results import Row, in_order


@dataclass(frozen=True, kw_only=True)
class ReportedRows:
    """Rows with what is needed to show them.

    Args:
        rows: the rows.
        methods: names of methods in the order in which they are shown; others follow by name.
        run_dirs: the run directory of every trial, by its id; what a trial left there is not shown without it.
    """

    rows: Sequence[Row]
    methods: Sequence[str] = ()
    run_dirs: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of_run(cls, run_dir: Path, rows: Sequence[Row], methods: Sequence[str] = ()) -> "ReportedRows":
        """Rows of one run directory."""
        return cls(rows=rows, methods=methods, run_dirs={row.trial_id: run_dir for row in rows})

    def read_predictions(self, row: Row) -> Predictions | None:
        """The predictions of a row; None if it was trained before predictions were kept.

        Raises:
            UserError: they are damaged.
        """
        run_dir = self.run_dirs.get(row.trial_id)
        return None if run_dir is None else find_predictions(run_dir, row)

    def job_records(self) -> list[tuple[str, JobRecord]]:
        """The last job of every run directory, by the name of the directory.

        Raises:
            JobError: the record of a job is damaged.
        """
        folders = sorted(set(self.run_dirs.values()))
        return [(folder.name, record) for folder in folders if (record := read_job_record(folder))]

    def comparisons(self) -> list[Comparison]:
        """The rows averaged over seeds, by data set, backbone and protocol.

        Raises:
            UserError: predictions are damaged.
        """
        return comparisons_of(summarize(self.rows, self.methods), self.read_predictions)

    def labeled(self) -> list[tuple[str, Row]]:
        """Every row with its method and the options and conditions in which it differs from others."""
        in_label = differing_by_method(self.rows)
        return [(label(row, in_label[row.method]), row) for row in in_order(self.rows, self.methods)]
