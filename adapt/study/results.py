"""Collects the results of all parts of a study: one table in the terminal, `results.csv` and `report.html`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from adapt.job.trial_run import read_rows
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.table import print_failures, print_table
from adapt.run_dir.config_file import configured_methods
from adapt.run_dir.results import Row, write_csv
from adapt.study.record import PartRecord, StudyRecord, read_record
from store.console.terminal import Terminal
from store.errors import JobError, UserError


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The results of a study.

    Attributes:
        run_dir: of the study.
        record: what became of its parts.
        rows: of all parts, also of those that failed later.
        run_dirs: the run directory of every row, by the id of its trial.
    """

    run_dir: Path
    record: StudyRecord
    rows: list[Row]
    run_dirs: Mapping[str, Path]

    @property
    def parts(self) -> tuple[PartRecord, ...]:
        """What became of every part."""
        return self.record.parts

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Name and reason of the parts that failed."""
        return [(part.name, part.reason) for part in self.record.failed]

    def write(self) -> None:
        """Write `results.csv` and `report.html` of the whole.

        Raises:
            JobError: a file cannot be written.
        """
        write_csv(self.run_dir, self.rows)
        text = yaml.safe_dump(self.record.study, sort_keys=False)
        write_report(self.run_dir, self.reported(), text, title=self.record.name, failures=self.failures)

    def print(self) -> None:
        """Print the table of all parts, and the parts that failed."""
        print_table(self.reported().comparisons(), Terminal())
        print_failures(self.failures, Terminal())

    def reported(self) -> ReportedRows:
        """The rows as tables and the report show them."""
        methods = [name for run_dir in dict.fromkeys(self.run_dirs.values()) for name in configured_methods(run_dir)]
        return ReportedRows(rows=self.rows, methods=methods, run_dirs=self.run_dirs)

    def require_all(self) -> None:
        """Refuse a study of which parts failed.

        Raises:
            JobError: the message has their names and reasons.
        """
        if self.failures:
            lines = [f"{name}: {reason}" for name, reason in self.failures]
            raise JobError("\n".join([f"{len(lines)} of {len(self.parts)} parts failed", *lines]))


def collect(run_dir: Path, record: StudyRecord) -> StudyResult:
    """Read the rows of all parts of a study.

    Raises:
        UserError: the results of a part that is done are damaged.
    """
    found = [(run_dir / part.name, row) for part in record.parts for row in _rows_of(run_dir, part)]
    return StudyResult(
        run_dir=run_dir,
        record=record,
        rows=[row for _, row in found],
        run_dirs={row.trial_id: folder for folder, row in found},
    )


def read_study_results(run_dir: Path) -> StudyResult:
    """Read the results of a study that has run.

    Raises:
        UserError: the results of a part that is done are damaged.
        JobError: the record is damaged.
    """
    return collect(run_dir, read_record(run_dir))


def _rows_of(run_dir: Path, part: PartRecord) -> list[Row]:
    try:
        return read_rows(run_dir / part.name)
    except UserError:
        if part.status == "failed":  # its damaged results may be the reason
            return []
        raise
