"""Tables and headlines show intervals, and mark what is inside the noise of the best method on validation."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_predictions import first_right, made_run, make_predictions
from result_rows import Tags, make_row, terminal

from adapt.report.comparison import Comparison, comparisons_of, headline, interval_text
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.seed_averages import summarize
from adapt.run_dir.predictions import find_predictions, predictions_path, write_predictions
from adapt.run_dir.results import Row

# losa and lora differ at 4 of 1,000 samples, both from the probe at more than 100
RIGHT = {
    "linear_probe": [first_right(700), first_right(710)],
    "lora": [first_right(848), first_right(850)],
    "losa": [np.roll(first_right(850), 2), first_right(850)],
}


def compare(run_dir: Path, rows: list[Row]) -> Comparison:
    (comparison,) = comparisons_of(summarize(rows), partial(find_predictions, run_dir))
    return comparison


def test_methods_inside_the_noise_of_the_best_are_marked(tmp_path: Path):
    comparison = compare(tmp_path, made_run(tmp_path, RIGHT))
    assert {s.label: comparison.is_inside_noise(s) for s in comparison.summaries} == {
        "linear_probe": False,
        "lora": True,
        "losa": False,
    }
    texts = [interval_text(comparison, summary) for summary in comparison.summaries]
    assert [text.endswith(" ≈") for text in texts] == [False, True, False]


def test_an_interval_surrounds_the_mean(tmp_path: Path):
    comparison = compare(tmp_path, made_run(tmp_path, RIGHT))
    for summary in comparison.summaries:
        found = comparison.evidence[summary.trial_ids].interval
        standard_error = 100 * np.sqrt(0.85 * 0.15 / 1000)
        assert found.low < comparison.mean(summary) < found.high
        assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.35)


def test_the_terminal_shows_interval_mark_and_legend(tmp_path: Path):
    rows = made_run(tmp_path, RIGHT)
    text = terminal(rows, read=partial(find_predictions, tmp_path))
    assert "95 % CI" in text
    (lora,) = [line for line in text.splitlines() if line.strip().startswith("lora")]
    assert "≈" in lora
    assert "≈ inside the noise of the best on validation (paired bootstrap test, level 0.05, Holm)" in text
    assert "this is outside the noise of the test samples (p = " in " ".join(text.split())


def test_80_columns_hold_the_interval(tmp_path: Path):
    right = {**RIGHT, "transformer_probe": RIGHT["lora"]}
    rows = made_run(tmp_path, right, trainable_params=85_798_656)
    text = terminal(rows, 80, read=partial(find_predictions, tmp_path))
    assert text.count("±") >= 4
    assert text.count("85,798,656") == 4
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_without_predictions_nothing_claims_to_be_sure():
    text = terminal([make_row("linear_probe", top1=80.0), make_row("losa", top1=95.0)])
    assert "CI" not in text
    assert "noise" not in text


def test_a_method_without_predictions_of_all_seeds_has_a_dash(tmp_path: Path):
    rows = made_run(tmp_path, RIGHT)
    predictions_path(tmp_path, rows[0]).unlink()
    comparison = compare(tmp_path, rows)
    probe = comparison.summaries[0]
    assert interval_text(comparison, probe) == "–"
    assert comparison.is_inside_noise(probe) is None
    assert "noise" not in headline(comparison)


def test_the_headline_says_when_the_gain_is_inside_the_noise(tmp_path: Path):
    right = {"linear_probe": RIGHT["lora"], "losa": RIGHT["losa"]}
    line = headline(compare(tmp_path, made_run(tmp_path, right)))
    assert "+0.10 points on the linear probe" in line
    assert "; this is inside the noise of the test samples (p = " in line


def test_the_report_has_intervals_of_its_run_directory(tmp_path: Path):
    text = write_report(tmp_path, ReportedRows.of_run(tmp_path, made_run(tmp_path, RIGHT))).read_text(encoding="utf-8")
    assert "95 % CI" in text
    assert " ≈</td>" in text
    assert "≈ inside the noise" in text
    assert Tags(text).named("table")
    backwards = ReportedRows.of_run(tmp_path, made_run(tmp_path, RIGHT)[::-1])
    assert text == write_report(tmp_path, backwards).read_text(encoding="utf-8")


def test_methods_are_compared_over_the_seeds_that_both_have(tmp_path: Path):
    right = {"linear_probe": RIGHT["linear_probe"][:1], "losa": RIGHT["losa"]}
    comparison = compare(tmp_path, made_run(tmp_path, right))
    assert comparison.is_inside_noise(comparison.summaries[0]) is False


def test_methods_without_a_common_seed_are_not_tested(tmp_path: Path):
    rows = made_run(tmp_path, {"losa": RIGHT["losa"]})
    other = make_row("lora", 7, top1=70.0, trial_id="f" * 16)
    write_predictions(predictions_path(tmp_path, other), make_predictions(first_right(700), other.trial_id))
    comparison = compare(tmp_path, [*rows, other])
    lora = comparison.summaries[0]
    assert comparison.is_inside_noise(lora) is None
    assert interval_text(comparison, lora) != "–"


@pytest.mark.parametrize("changes", [{"offset": 1}, {"classes": 4}])
def test_methods_tested_on_other_samples_or_labels_are_not_compared(tmp_path: Path, changes: dict[str, int]):
    rows = made_run(tmp_path, {name: RIGHT[name] for name in ("losa", "lora")})
    for row in rows:
        if row.method == "lora":
            path = predictions_path(tmp_path, row)
            write_predictions(path, make_predictions(first_right(848), row.trial_id, **changes))
    comparison = compare(tmp_path, rows)
    others = [summary for summary in comparison.summaries if summary != comparison.best]
    assert [comparison.is_inside_noise(summary) for summary in others] == [None]
    assert all(interval_text(comparison, summary) != "–" for summary in comparison.summaries)


@pytest.mark.parametrize("changes", [{"offset": 1}, {"classes": 4}])
def test_a_method_whose_seeds_were_tested_on_other_samples_has_no_interval(tmp_path: Path, changes: dict[str, int]):
    rows = made_run(tmp_path, RIGHT)
    path = predictions_path(tmp_path, rows[-1])
    write_predictions(path, make_predictions(first_right(850), rows[-1].trial_id, **changes))
    comparison = compare(tmp_path, rows)
    (losa,) = [summary for summary in comparison.summaries if summary.method == rows[-1].method]
    assert interval_text(comparison, losa) == "–"


def test_balanced_classes_are_compared_by_the_mean_class_accuracy():
    rows = [make_row(conditions={"balance_classes": balanced}, trial_id=str(balanced)) for balanced in (False, True)]
    assert [c.metric for c in comparisons_of(summarize(rows))] == ["top1", "mean_class_accuracy"]
