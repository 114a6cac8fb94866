"""Learning curves and searches of a run: they are kept whole, and the page shows them."""

from pathlib import Path

import pytest
from result_rows import Tags, make_row

from adapt.config.trials import Trial
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.search_grid import search_grid
from adapt.run_dir.curves import Curve, find_curve, find_validated, write_curve
from adapt.run_dir.results import Row
from adapt.training.scores import Score, SearchScores
from extract.job.extraction import extract_tokens  # noqa: F401


def curve_of(row: Row, **changes) -> Curve:
    fields = {name: getattr(row, name) for name in ("trial_id", "method", "options", "lr", "weight_decay", "seed")}
    values = {"train_loss": [2.0, 1.0, None], "val_score": [50.0, row.val_score, 60.0], "val_loss": [1.0, 0.5, 0.6]}
    return Curve(**fields | values | changes)


def test_a_curve_is_found_again_by_its_trial(tmp_path: Path) -> None:
    row, other = make_row("losa", trial_id="0123456789"), make_row("losa", 1, trial_id="9876543210")
    write_curve(tmp_path, curve_of(row))
    assert find_curve(tmp_path, row) == curve_of(row)
    assert find_curve(tmp_path, other) is None


def test_the_validation_scores_of_a_refitted_trial_are_those_of_its_search(tmp_path: Path) -> None:
    row = make_row("losa", trial_id="0123456789", lr=0.01, val_score=77.25)
    unknown = [None] * 3
    write_curve(tmp_path, curve_of(row, val_score=unknown, val_loss=unknown))
    write_curve(tmp_path, curve_of(row, trial_id="aaaaaaaaaa", lr=0.1))  # another point of the search
    write_curve(tmp_path, curve_of(row, trial_id="bbbbbbbbbb", val_score=[1.0, 2.0, 3.0]))  # an earlier search
    chosen = curve_of(row, trial_id="cccccccccc")
    write_curve(tmp_path, chosen)
    assert find_validated(tmp_path, row) == chosen
    text = write_report(tmp_path, ReportedRows.of_run(tmp_path, [row])).read_text(encoding="utf-8")
    assert "Training loss of losa" in text
    assert "Validation score by epoch, in the search" in text


def write_search(run_dir: Path, name: str, trials: list[Trial], scores: list[float]) -> None:
    path = run_dir / "search" / f"losa-{name}.json"
    found = [Score(score=score, loss=1.0, epoch=3, epochs=5) for score in scores]
    SearchScores(path, "losa", full_epochs=5).add(trials, found)


@pytest.fixture
def trials(tiny_config) -> list[Trial]:
    """Three points of LoSA that differ in their learning rate."""
    return list(tiny_config("sweep.lr=[0.1,0.01,0.001]").parsed_methods()[1].trials)


def test_the_search_of_a_row_is_that_with_its_score(tmp_path: Path, trials: list[Trial]) -> None:
    write_search(tmp_path, "earlier", trials, [float("-inf"), 80.0, 70.0])
    write_search(tmp_path, "mine", trials, [float("-inf"), 90.0, 85.5])
    row = make_row("losa", options=trials[1].options.model_dump(mode="json"), lr=0.01, val_score=90.0)
    grid = search_grid(tmp_path, row)
    assert grid.names == ["learning rate"]
    shown = [(*point.cells, point.score, point.is_chosen) for point in grid.listed]
    assert shown == [("0.01", "90.00", True), ("0.001", "85.50", False), ("0.1", "diverged", False)]
    text = write_report(tmp_path, ReportedRows.of_run(tmp_path, [row])).read_text(encoding="utf-8")
    assert text.count(">chosen<") == 1
    Tags(text)


def test_a_trial_without_a_search_has_none(tmp_path: Path, trials: list[Trial]) -> None:
    write_search(tmp_path, "one", trials[:1], [50.0])
    row = make_row("losa", options=trials[0].options.model_dump(mode="json"), lr=0.1)
    assert search_grid(tmp_path, row) is None
    assert search_grid(tmp_path / "elsewhere", row) is None
