"""Metrics agree with scikit-learn and with brute force, and are right in edge cases."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, f1_score, recall_score, top_k_accuracy_score

from adapt.training.metrics import Metrics, evaluate
from store.errors import JobError


@st.composite
def single_label(draw):
    n, k = draw(st.integers(1, 30)), draw(st.integers(1, 9))
    logits = draw(arrays(np.float32, (n, k), elements=st.integers(-3, 3)))  # few values: many ties
    labels = draw(arrays(np.int64, n, elements=st.integers(0, k - 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


@st.composite
def multi_label(draw):
    n, k = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    logits = draw(arrays(np.float32, (n, k), elements=st.integers(-3, 3)))
    labels = draw(arrays(np.uint8, (n, k), elements=st.integers(0, 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def defined(metrics: Metrics) -> list[float]:
    return [value for value in vars(metrics).values() if value is not None]


def assert_same(a: Metrics, b: Metrics) -> None:
    for name, value in vars(a).items():
        assert vars(b)[name] == (None if value is None else pytest.approx(value)), name


@given(single_label())
def test_single_label_agrees_with_brute_force(case):
    logits, labels = (x.tolist() for x in case)
    n_classes = len(logits[0])
    order = [sorted(range(n_classes), key=lambda c, row=row: (-row[c], c)) for row in logits]
    predicted = [classes[0] for classes in order]
    recalls, f1s = [], []
    for c in set(labels):
        hits = sum(p == label == c for p, label in zip(predicted, labels, strict=True))
        recalls.append(hits / labels.count(c))
        f1s.append(2 * hits / (labels.count(c) + predicted.count(c)))
    metrics = evaluate(*case)
    assert metrics.top1 == pytest.approx(100 * np.mean(np.equal(predicted, labels)))
    top5 = 100 * np.mean([label in classes[:5] for label, classes in zip(labels, order, strict=True)])
    assert metrics.top5 == (pytest.approx(top5) if n_classes > 5 else None)
    assert metrics.mean_class_accuracy == pytest.approx(100 * np.mean(recalls))
    assert metrics.macro_f1 == pytest.approx(100 * np.mean(f1s))
    assert metrics.mean_average_precision is None


def test_single_label_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator)
    labels = torch.randint(0, 9, (500,), generator=generator)  # class 9 has no sample
    metrics, predicted, present = evaluate(logits, labels), logits.argmax(1).numpy(), list(range(9))
    assert metrics.top1 == pytest.approx(100 * float((predicted == labels.numpy()).mean()))
    assert metrics.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(10)))
    recall = recall_score(labels, predicted, labels=present, average="macro")
    assert metrics.mean_class_accuracy == pytest.approx(100 * recall)
    assert metrics.macro_f1 == pytest.approx(100 * f1_score(labels, predicted, labels=present, average="macro"))


@given(multi_label())
def test_multi_label_agrees_with_scikit_learn(case):
    logits, labels = case[0].numpy(), case[1].numpy()
    present = np.flatnonzero(labels.any(axis=0))
    metrics = evaluate(*case)
    assert (metrics.top1, metrics.top5, metrics.mean_class_accuracy) == (None, None, None)
    if not len(present):
        assert (metrics.mean_average_precision, metrics.macro_f1) == (None, None)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precisions = [average_precision_score(labels[:, c], logits[:, c]) for c in present]
        f1s = [f1_score(labels[:, c], logits[:, c] > 0, zero_division=0) for c in present]
    assert metrics.mean_average_precision == pytest.approx(100 * np.mean(precisions))
    assert metrics.macro_f1 == pytest.approx(100 * np.mean(f1s))


def test_average_precision_of_a_small_example_by_hand():
    logits = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    labels = torch.tensor([[1], [0], [1], [0]], dtype=torch.uint8)
    assert evaluate(logits, labels).mean_average_precision == pytest.approx(100 * (1 / 1 + 2 / 3) / 2)


@given(st.one_of(single_label(), multi_label()))
def test_every_metric_lies_between_0_and_100(case):
    assert all(0 <= value <= 100 for value in defined(evaluate(*case)))


@given(st.one_of(single_label(), multi_label()), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(case, random):
    logits, labels = case
    order = torch.tensor(random.sample(range(len(labels)), len(labels)))
    assert_same(evaluate(logits, labels), evaluate(logits[order], labels[order]))


@given(multi_label(), st.randoms(use_true_random=False))
def test_order_of_classes_does_not_matter_in_multi_label(case, random):
    logits, labels = case
    order = torch.tensor(random.sample(range(logits.shape[1]), logits.shape[1]))
    assert_same(evaluate(logits, labels), evaluate(logits[:, order], labels[:, order]))


@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 2**31))
def test_order_of_classes_does_not_matter_without_ties(n_classes, n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    order = torch.randperm(n_classes, generator=generator)
    assert_same(evaluate(logits, labels), evaluate(logits[:, order], torch.argsort(order)[labels]))


@given(st.integers(1, 9))
def test_perfect_logits_score_100(n_classes):
    assert all(value == 100 for value in defined(evaluate(torch.eye(n_classes), torch.arange(n_classes))))


def test_one_sample():
    assert evaluate(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2])) == Metrics(100.0, None, 100.0, 100.0, None)


def test_a_class_without_samples_is_left_out_of_the_average():
    metrics = evaluate(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 1, 1]))
    assert metrics.mean_class_accuracy == pytest.approx(50)  # classes 0 and 1, not 2
    assert metrics.macro_f1 == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_all_equal_logits_count_as_the_first_class():
    metrics = evaluate(torch.zeros(12, 6), torch.arange(12) % 6)
    assert metrics.top1 == pytest.approx(100 / 6)
    assert metrics.top5 == pytest.approx(500 / 6)


def test_all_equal_logits_have_the_average_precision_of_chance():
    labels = torch.tensor([[1], [0], [0], [0]], dtype=torch.uint8)
    assert evaluate(torch.zeros(4, 1), labels) == Metrics(None, None, None, 0.0, 25.0)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_top5_is_undefined_up_to_five_classes(n_classes):
    assert evaluate(torch.zeros(3, n_classes), torch.zeros(3, dtype=torch.int64)).top5 is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_taken(dtype):
    assert evaluate(torch.eye(4, dtype=dtype).requires_grad_(), torch.arange(4)).top1 == 100


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.int64])
def test_multi_label_targets_of_every_dtype_are_taken(dtype):
    assert evaluate(2 * torch.eye(3) - 1, torch.eye(3).to(dtype)) == Metrics(None, None, None, 100.0, 100.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4)])
def test_non_finite_logits_are_refused_by_name(value, labels):
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(JobError, match=rf"1 of 12 logits .* sample 1, class 2, value {value}.*lower train\.lr"):
        evaluate(logits, labels)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_head_are_refused(label):
    with pytest.raises(JobError, match=f"label {label} of sample 1 is not among the 4 classes of the head"):
        evaluate(torch.zeros(2, 4), torch.tensor([0, label]))


def test_multi_labels_other_than_0_and_1_are_refused():
    with pytest.raises(JobError, match=r"0 or 1, not 0\.5 \(sample 0, class 1\)"):
        evaluate(torch.zeros(1, 2), torch.tensor([[0.0, 0.5]]))


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(JobError, match="nothing to evaluate"):
        evaluate(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(Exception, match=r"do not match|[Tt]ype-check"):  # the latter from jaxtyping's import hook
        evaluate(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))


def test_score_is_what_the_task_is_selected_by():
    single = Metrics(80.0, 90.0, 70.0, 60.0, None)
    assert (single.score(), single.score(balance_classes=True)) == (80.0, 70.0)
    multi = Metrics(None, None, None, 60.0, 50.0)
    assert (multi.score(), multi.score(balance_classes=True)) == (50.0, 50.0)


def test_score_without_any_positive_says_what_to_do():
    with pytest.raises(JobError, match=r"no class has a positive sample.*data\.val_fraction"):
        evaluate(torch.zeros(2, 3), torch.zeros(2, 3)).score()
