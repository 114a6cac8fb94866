"""Results by class: accuracies, confusions and calibration are those that a plain count gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_predictions import made_run, make_multi_label, make_predictions
from result_rows import Tags, make_row
from sklearn.metrics import average_precision_score, confusion_matrix

from adapt.report.class_results import class_results
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from adapt.report.seed_averages import summarize
from adapt.run_dir.predictions import Predictions
from adapt.training.calibration import N_BINS, calibration_error, confidence_bins


def summary_of(*trials: Predictions):
    rows = [make_row("losa", seed, trial_id=trial.trial_id) for seed, trial in enumerate(trials)]
    found = {trial.trial_id: trial for trial in trials}
    return summarize(rows)[0], lambda row: found.get(row.trial_id)


def random_trial(seed: int, classes: int = 4, samples: int = 60, trial_id: str = "") -> Predictions:
    draw = np.random.default_rng(seed)
    made = make_predictions(np.ones(samples, bool), trial_id or f"t{seed}", classes)
    return Predictions(**{**vars(made), "logits": draw.normal(size=(samples, classes)).astype(np.float32)})


@st.composite
def logits_and_labels(draw):
    n, k = draw(st.integers(1, 40)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    logits = (scale * generator.normal(size=(n, k))).astype(np.float32)
    return logits, generator.integers(0, k, n)


@given(logits_and_labels())
def test_the_calibration_error_is_that_of_a_naive_loop(given_case):
    logits, labels = given_case
    inside = [[] for _ in range(N_BINS)]
    for scores, label in zip(logits.astype(float), labels, strict=True):
        exps = np.exp(scores - scores.max())
        probabilities = exps / exps.sum()
        for m in range(N_BINS):
            if m / N_BINS < probabilities.max() <= (m + 1) / N_BINS:
                inside[m].append((probabilities.max(), probabilities.argmax() == label))
    expected = sum(
        len(pairs) / len(labels) * abs(np.mean([right for _, right in pairs]) - np.mean([p for p, _ in pairs]))
        for pairs in inside
        if pairs
    )
    assert calibration_error(confidence_bins(logits, labels)) == pytest.approx(100 * expected, abs=1e-6)


def test_confident_and_right_is_calibrated_and_confident_and_wrong_is_not():
    logits, labels = np.array([[50.0, 0.0]] * 4, np.float32), np.array([0, 0, 0, 0])
    assert calibration_error(confidence_bins(logits, labels)) == pytest.approx(0)
    assert calibration_error(confidence_bins(logits, 1 - labels)) == pytest.approx(100)


def test_the_matrix_is_the_mean_over_seeds_in_percent_of_a_class():
    trials = [random_trial(0), random_trial(1)]
    results = class_results(*summary_of(*trials))
    expected = np.mean([confusion_matrix(t.labels, t.logits.argmax(1), normalize="true") for t in trials], axis=0)
    np.testing.assert_allclose(results.matrix, 100 * expected)
    by_name = {result.name: result.percent for result in results.listed}
    np.testing.assert_allclose([by_name[name] for name in results.names], 100 * expected.diagonal())
    assert list(by_name.values()) == sorted(by_name.values())  # the worst comes first


def test_many_classes_have_their_most_confused_pairs_in_place_of_a_matrix():
    trial = random_trial(0, classes=31, samples=400)
    results = class_results(*summary_of(trial))
    assert (results.names, results.matrix) == ((), ())
    wrong = confusion_matrix(trial.labels, trial.logits.argmax(1)) * (1 - np.eye(31))
    assert [pair.samples for pair in results.pairs] == sorted(wrong.flatten(), reverse=True)[: len(results.pairs)]
    assert all(pair.true != pair.predicted for pair in results.pairs)


def test_multi_label_has_the_average_precision_of_every_class_with_a_positive():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, (30, 3))
    labels[:, 1] = 0
    trial = make_multi_label(draw.normal(size=(30, 3)), labels)
    results = class_results(*summary_of(trial))
    found = {result.name: (result.samples, result.percent) for result in results.listed}
    expected = {
        f"class {k}": (labels[:, k].sum(), 100 * average_precision_score(labels[:, k], trial.logits[:, k]))
        for k in (0, 2)
    }
    assert found == {name: (samples, pytest.approx(percent)) for name, (samples, percent) in expected.items()}
    assert (results.matrix, results.calibration_error) == ((), None)


def test_seeds_on_other_samples_are_not_mixed():
    other = make_predictions(np.zeros(60, bool), "other", 4, offset=1)
    alone, both = class_results(*summary_of(random_trial(0))), class_results(*summary_of(random_trial(0), other))
    assert alone == both


def test_a_method_without_predictions_has_none():
    summary, _ = summary_of(random_trial(0))
    assert class_results(summary, lambda row: None) is None


def test_the_page_shows_the_best_method_and_folds_the_others(tmp_path):
    right = {"linear_probe": [np.arange(90) < 60], "losa": [np.arange(90) < 80], "ladder": [np.arange(90) < 70]}
    rows = made_run(tmp_path, right)
    text = write_report(tmp_path, ReportedRows.of_run(tmp_path, rows)).read_text(encoding="utf-8")
    tags = Tags(text)
    assert sum("confusion" in (table.get("class") or "") for table in tags.named("table")) == 3
    assert text.index("<summary>ladder") < text.index("<summary>linear_probe")
    assert "<summary>losa" not in text
    assert "calibration error" in text
