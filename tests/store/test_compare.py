"""Comparing a store with what a job expects: growth, labels, and models that do not change."""

from typing import Any

import numpy as np
import pydantic
import pytest
import small_store

from store.compare import may_grow_into
from store.config import StoreConfig
from store.listing import label_fault
from store.schema import SplitInfo

STORED = {"splits": {"train": SplitInfo(num_samples=5), "test": SplitInfo(num_samples=2)}, "layers": (0, 2)}


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"splits": {"train": SplitInfo(num_samples=6), "test": SplitInfo(num_samples=2)}}, True),
        ({"layers": (0, 1, 2)}, True),
        ({"layers": (0, 1)}, False),
        ({"splits": {"train": SplitInfo(num_samples=4), "test": SplitInfo(num_samples=2)}}, False),
        ({"splits": {"train": SplitInfo(num_samples=5)}}, False),
        ({"dim": 8}, False),
    ],
)
def test_a_store_may_grow_by_samples_and_layers_alone(changes: dict[str, Any], may: bool) -> None:
    stored = small_store.schema(**STORED)
    assert may_grow_into(stored, small_store.schema(**{**STORED, **changes})) is may


@pytest.mark.parametrize(
    ("labels", "is_legal"),
    [([0, 1, 2], True), ([1, 1, 1], True), ([0, 0, 0], True), ([-1, 0, 1], False), ([0, 1, 3], False), ([0, 1], False)],
)
def test_labels_are_indices_of_classes(labels: list[int], is_legal: bool) -> None:
    assert (label_fault(np.array(labels), small_store.schema(), 3) is None) is is_legal


@pytest.mark.parametrize(("rows", "is_legal"), [([[0, 1, 1]], True), ([[0, 0, 0]], True), ([[0, 2, 0]], False)])
def test_labels_of_several_classes_are_zeros_and_ones(rows: list[list[int]], is_legal: bool) -> None:
    assert (label_fault(np.array(rows, np.uint8), small_store.schema(multi_label=True), 1) is None) is is_legal


def test_a_section_of_the_configuration_does_not_change() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        StoreConfig().path = "other.zarr"  # type: ignore[misc]
