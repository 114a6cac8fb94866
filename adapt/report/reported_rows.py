"""Holds the rows that a table or a report shows, and where their predictions are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapt.report.comparison import Comparison, comparisons_of
from adapt.report.evidence import ReadPredictions, no_predictions
from adapt.report.seed_averages import differing_by_method, label, summarize
from adapt.run_dir.predictions import find_predictions
from adapt.run_dir.results import Row, in_order


@dataclass(frozen=True, kw_only=True)
class ReportedRows:
    """Rows with what is needed to show them.

    Args:
        rows: the rows.
        methods: names of methods in the order in which they are shown; others follow by name.
        read_predictions: gives the predictions of a row.
    """

    rows: Sequence[Row]
    methods: Sequence[str] = ()
    read_predictions: ReadPredictions = no_predictions

    @classmethod
    def of_run(cls, run_dir: Path, rows: Sequence[Row], methods: Sequence[str] = ()) -> "ReportedRows":
        """Rows of one run directory, with the predictions that it has."""
        return cls(rows=rows, methods=methods, read_predictions=partial(find_predictions, run_dir))

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
