"""Resampled metrics equal the metrics of resampled data; intervals agree with SciPy; tests hold their level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_predictions import make_multi_label, make_predictions
from scipy.stats import bootstrap

from adapt.report.bootstrap import ALPHA, holm, interval, p_value, resample, score_of
from adapt.report.predicted_metrics import metrics_of
from adapt.run_dir.predictions import Predictions


def resampled(made: Predictions, counts: np.ndarray) -> Predictions:
    """The predictions with every sample as often as it was drawn."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return Predictions(
        trial_id=made.trial_id,
        classes=made.classes,
        sample_ids=tuple(f"{row}" for row in rows),
        labels=made.labels[rows],
        logits=made.logits[rows],
    )


def assert_equal_metrics(made: Predictions, columns: np.ndarray, metrics: tuple[str, ...]) -> None:
    for name in metrics:
        values = score_of(name, made)(columns.astype(np.float32))
        for value, counts in zip(values, columns.T, strict=True):
            expected = getattr(metrics_of(resampled(made, counts)), name)
            assert np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-4)


def drawn(data: st.DataObject, n: int) -> np.ndarray:
    """Counts of two resamples, the second of which is the split itself."""
    rows = data.draw(arrays(np.int64, n, elements=st.integers(0, n - 1)))
    return np.stack([np.bincount(rows, minlength=n), np.ones(n, np.int64)], axis=1)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_accuracies_of_a_resample_are_those_of_its_samples(data: st.DataObject, n: int, k: int):
    logits = data.draw(arrays(np.float32, (n, k), elements=st.integers(-2, 2)))  # few values: many ties
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, k - 1)))
    made = Predictions(trial_id="t", classes=("",) * k, sample_ids=("",) * n, labels=labels, logits=logits)
    assert_equal_metrics(made, drawn(data, n), ("top1", "mean_class_accuracy"))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_average_precision_of_a_resample_is_that_of_its_samples(data: st.DataObject, n: int, k: int):
    scores = data.draw(arrays(np.float32, (n, k), elements=st.integers(-2, 2)))
    labels = data.draw(arrays(np.uint8, (n, k), elements=st.integers(0, 1)))
    assert_equal_metrics(make_multi_label(scores, labels), drawn(data, n), ("mean_average_precision",))


def test_intervals_agree_with_scipy():
    hits = np.random.default_rng(5).random(400) < 0.8
    (values,) = resample([score_of("top1", make_predictions(hits))], 400, n_pairs=1)
    found = interval(values)
    expected = bootstrap((100.0 * hits,), np.mean, n_resamples=9999, method="percentile", rng=1).confidence_interval
    assert found is not None
    assert found.low == pytest.approx(expected.low, abs=0.5)
    assert found.high == pytest.approx(expected.high, abs=0.5)


def test_resamples_are_the_same_each_time_and_for_all_trials():
    score = score_of("top1", make_predictions(np.arange(50) % 3 > 0))
    values = resample([score, score], 50, n_pairs=1)
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values, resample([score, score], 50, n_pairs=1))


def test_a_resample_without_any_positive_is_left_out():
    made = make_multi_label(np.arange(6.0).reshape(3, 2), np.array([[0, 0], [1, 0], [0, 0]]))
    (values,) = resample([score_of("mean_average_precision", made)], 3, n_pairs=1)
    assert 0 < len(values) < 2000
    assert np.isfinite(values).all()
    nothing = make_multi_label(np.ones((3, 2)), np.zeros((3, 2)))
    (values,) = resample([score_of("mean_average_precision", nothing)], 3, n_pairs=1)
    assert interval(values) is None


def test_equal_methods_have_the_largest_p_value_and_unequal_ones_the_smallest():
    values = np.random.default_rng(0).random(999)
    assert p_value(values, values + 1e-12) == 1
    assert p_value(values, values + 1) == p_value(values + 1, values) == pytest.approx(2 / 1000)


def test_pairing_finds_a_difference_that_two_intervals_hide():
    hard = np.random.default_rng(1).random(1000) < 0.3  # samples that both methods get wrong
    worse = ~hard & (np.arange(1000) >= 12)
    values = resample([score_of("top1", make_predictions(right)) for right in (~hard, worse)], 1000, n_pairs=1)
    better, other = interval(values[0]), interval(values[1])
    assert better is not None
    assert other is not None
    assert other.high > better.low
    assert p_value(values[0], values[1]) < 0.01


def test_the_level_of_the_test_is_kept():
    """Methods of the same accuracy are told apart in about 5 percent of the cases."""
    draw, n_cases = np.random.default_rng(2), 100
    told_apart = 0
    for _ in range(n_cases):
        pair = [score_of("top1", make_predictions(draw.random(300) < 0.8)) for _ in range(2)]
        told_apart += p_value(*resample(pair, 300, n_pairs=1)) <= ALPHA
    assert 1 <= told_apart <= 14  # 5 expected


def test_many_pairs_leave_a_large_difference_outside_the_noise():
    n_pairs = 300
    right = np.arange(400) % 4 > 0
    values = resample([score_of("top1", make_predictions(r)) for r in (right, ~right)], 400, n_pairs=n_pairs)
    assert max(holm([p_value(values[0], values[1])] * n_pairs)) < ALPHA


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.04, 0.3, 1.0]), max_size=6))
def test_holm_rejects_one_after_the_other(p_values: list[float]):
    adjusted, rejected = holm(p_values), set[int]()
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[position] > ALPHA / (len(p_values) - rank):
            break
        rejected.add(int(position))
    assert {i for i, value in enumerate(adjusted) if value <= ALPHA} == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
