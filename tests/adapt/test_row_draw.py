"""The rows of a draw are disjoint, deterministic and stratified; a subset is the whole budget of labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.training.row_draw import RowDraw, draw_rows, warn_of_small_classes
from store.errors import Note, UserError

MakeConfig = Callable[..., Config]
sizes = st.lists(st.integers(2, 30), min_size=1, max_size=5)  # samples of each class
seeds = st.integers(0, 2**63 - 1)
fractions = st.floats(0.05, 0.95)


def labels_of(class_sizes: list[int], views: int = 1) -> torch.Tensor:
    """Class indices of rows, in a fixed mixed order."""
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    return torch.from_numpy(np.repeat(np.random.default_rng(0).permutation(labels), views))


def counts(labels: torch.Tensor, rows: np.ndarray, n_classes: int) -> list[int]:
    return np.bincount(labels.numpy()[rows], minlength=n_classes).tolist()


def own_validation(labels: torch.Tensor, views: int) -> np.ndarray:
    """Every third sample."""
    samples = np.arange(0, len(labels) // views, 3)
    return (samples[:, None] * views + np.arange(views)).ravel()


subsets = st.one_of(
    st.just({}),
    st.builds(lambda shots: {"shots": shots}, st.integers(2, 12)),
    st.builds(lambda fraction: {"fraction": fraction}, fractions),
)


@given(sizes, seeds, fractions, subsets, st.integers(1, 3), st.booleans())
def test_the_parts_are_disjoint_deterministic_and_hold_whole_samples(
    class_sizes: list[int], seed: int, val_fraction: float, subset: dict[str, Any], views: int, has_own: bool
) -> None:
    labels = labels_of(class_sizes, views)
    own = own_validation(labels, views) if has_own else None
    draw = RowDraw(val_fraction=None if has_own else val_fraction, **subset)
    options: Any = {"seed": seed, "views": views, "validation_rows": own}
    try:
        training, validation = draw_rows(labels, draw, **options)
    except UserError:  # too few samples for both parts
        assume(False)
    assert not set(training.tolist()) & set(validation.tolist())
    for part in (training, validation):
        assert len(part)
        assert (np.diff(part) > 0).all()
        assert (part.reshape(-1, views) == part[::views, None] + np.arange(views)).all()
        assert (part[::views] % views == 0).all()
    if own is not None:
        assert np.array_equal(validation, own)
    for first, second in zip((training, validation), draw_rows(labels, draw, **options), strict=True):
        assert np.array_equal(first, second)


@given(sizes, seeds, fractions, st.integers(2, 12))
def test_shots_take_k_of_each_class_and_leave_one_to_train_on(
    class_sizes: list[int], seed: int, val_fraction: float, shots: int
) -> None:
    labels, n_classes = labels_of(class_sizes), len(class_sizes)
    training, validation = draw_rows(labels, RowDraw(val_fraction=val_fraction, shots=shots), seed=seed)
    used = [min(shots, size) for size in class_sizes]
    for_validation = [min(max(1, round(val_fraction * n)), n - 1) for n in used]
    assert counts(labels, validation, n_classes) == for_validation
    assert counts(labels, training, n_classes) == [n - v for n, v in zip(used, for_validation, strict=True)]
    assert min(counts(labels, training, n_classes)) >= 1


@given(sizes, seeds, fractions)
def test_a_fraction_takes_its_share_of_each_class_and_at_least_one(
    class_sizes: list[int], seed: int, fraction: float
) -> None:
    labels, n_classes = labels_of(class_sizes), len(class_sizes)
    try:
        training, validation = draw_rows(labels, RowDraw(val_fraction=0.5, fraction=fraction), seed=seed)
    except UserError:
        assume(False)
    used = counts(labels, np.concatenate([training, validation]), n_classes)
    assert used == [max(1, round(fraction * size)) for size in class_sizes]


@given(sizes, seeds, st.integers(1, 12))
def test_with_an_own_validation_split_the_subset_is_of_the_rest(class_sizes: list[int], seed: int, shots: int) -> None:
    labels, n_classes = labels_of(class_sizes), len(class_sizes)
    own = own_validation(labels, 1)
    rest = counts(labels, np.setdiff1d(np.arange(len(labels)), own), n_classes)
    assume(sum(rest))
    draw = RowDraw(val_fraction=None, shots=shots)
    training, validation = draw_rows(labels, draw, seed=seed, validation_rows=own)
    assert np.array_equal(validation, own)
    assert counts(labels, training, n_classes) == [min(shots, n) for n in rest]


@given(sizes, seeds, fractions)
def test_without_a_subset_every_sample_is_used(class_sizes: list[int], seed: int, val_fraction: float) -> None:
    labels = labels_of(class_sizes)
    try:
        parts = draw_rows(labels, RowDraw(val_fraction=val_fraction), seed=seed)
    except UserError:
        assume(False)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_the_draw_of_all_samples_never_changes() -> None:
    _, validation = draw_rows(labels_of([10, 6, 4]), RowDraw(val_fraction=0.25), seed=7)
    assert validation.tolist() == [0, 8, 11, 15, 17]


def test_another_seed_draws_another_subset() -> None:
    labels, draw = labels_of([30, 30]), RowDraw(val_fraction=0.2, shots=5)
    subsets = [sorted(np.concatenate(draw_rows(labels, draw, seed=seed)).tolist()) for seed in (0, 1)]
    assert subsets[0] != subsets[1]


def test_multi_label_samples_have_a_fraction_and_no_shots() -> None:
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.uint8))
    training, validation = draw_rows(labels, RowDraw(val_fraction=0.25, fraction=0.5), seed=0)
    assert (len(training), len(validation)) == (15, 5)
    with pytest.raises(UserError, match=r"these samples have several labels; use train\.fraction"):
        draw_rows(labels, RowDraw(val_fraction=0.25, shots=3), seed=0)


@pytest.mark.parametrize(
    ("draw", "own", "message"),
    [
        (RowDraw(val_fraction=0.2, shots=1), None, r"train\.shots is 1, .*use at least 2, or data\.val_split"),
        (RowDraw(val_fraction=0.01), None, "val_fraction 0.01 of 12 training samples leaves 12 to train on and 0"),
        (RowDraw(val_fraction=0.01), None, "both must be at least 1; 0.15 leaves 9 and 3"),
        (RowDraw(val_fraction=0.1, fraction=0.1), None, "of 3 training samples leaves 3 to train on and 0 to validate"),
        (RowDraw(val_fraction=None), None, r"data\.val_split is set, but these samples have no validation split"),
        (RowDraw(val_fraction=None), [], r"data\.val_split leaves 12 to train on and 0 to validate on"),
        (RowDraw(val_fraction=None), list(range(12)), r"data\.val_split leaves 0 to train on and 12"),
        (RowDraw(val_fraction=None, shots=2), list(range(12)), r"data\.val_split leaves 0 to train on and 12"),
        (RowDraw(val_fraction=None, fraction=0.5), list(range(12)), r"data\.val_split leaves 0 to train on and 12"),
    ],
)
def test_a_draw_without_one_of_its_parts_is_refused(draw: RowDraw, own: list[int] | None, message: str) -> None:
    rows = None if own is None else np.array(own, np.int64)
    with pytest.raises(UserError, match=message):
        draw_rows(labels_of([4, 4, 4]), draw, seed=0, validation_rows=rows)


def test_small_classes_are_named_with_their_numbers_of_training_samples() -> None:
    labels, classes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2]), ("a", "b", "c")
    draw, own = RowDraw(val_fraction=None, shots=3), np.array([6, 7])
    with pytest.warns(Note, match=r"shots is 3, but there are fewer training samples of b \(2\), c \(2\); all"):
        warn_of_small_classes(labels, draw, classes, validation_rows=own)
    with pytest.warns(Note, match=r"of a \(2\), b \(1\), c \(2\)"):
        warn_of_small_classes(labels, RowDraw(val_fraction=0.2, shots=3), classes, views=2)
    warn_of_small_classes(labels, RowDraw(val_fraction=0.2, shots=2), classes)
    warn_of_small_classes(labels, RowDraw(val_fraction=0.2), classes)


def test_the_settings_of_a_configuration(tiny_config: MakeConfig) -> None:
    plain = RowDraw.of(tiny_config())
    assert plain.conditions == {"val_fraction": 0.25}
    assert RowDraw.of(tiny_config("train.fraction=1.0")) == plain
    few = RowDraw.of(tiny_config("train.shots=4"))
    assert few == RowDraw(val_fraction=0.25, shots=4)
    assert few.conditions == {"val_fraction": 0.25, "shots": 4}
    own = RowDraw.of(tiny_config("data.val_split=val", "train.fraction=0.5"))
    assert own.conditions == {"val_fraction": None, "fraction": 0.5}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"shots": 2, "fraction": 0.5}, r"train\.shots and train\.fraction are both given; keep one"),
        ({"shots": 0}, r"train\.shots: given 0"),
        ({"fraction": 0.0}, r"train\.fraction: given 0\.0"),
        ({"fraction": 1.5}, r"train\.fraction: given 1\.5"),
        ({"shots": 1}, r"train\.shots is 1, which leaves no sample of a class to validate on"),
    ],
)
def test_illegal_subsets_are_refused_when_the_configuration_is_loaded(train: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config({"backbone": {"weights": "random", "name": "vit_tiny_patch16_224"}, "train": train})


def test_one_shot_goes_with_an_own_validation_split() -> None:
    backbone = {"weights": "random", "name": "vit_tiny_patch16_224"}
    config = load_config({"backbone": backbone, "train": {"shots": 1}, "data": {"val_split": "val"}})
    assert RowDraw.of(config, for_search=True) == RowDraw(val_fraction=None, shots=1)
    assert RowDraw.of(config) == RowDraw(val_fraction=None, shots=1, refit=True)
