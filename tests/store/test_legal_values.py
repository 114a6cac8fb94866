"""What is legal in a store: growth, labels, logs, shapes of arrays, options."""

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import small_store

from store.array_io import create_array, open_array
from store.arrays import is_log
from store.compare import may_grow_into
from store.config import StoreConfig
from store.errors import JobError
from store.listing import label_fault
from store.schema import SplitInfo
from store.zarr_metadata import array_metadata, chunk_codecs

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
        ({"splits": STORED["splits"] | {"more": SplitInfo(num_samples=1)}}, True),
        ({"dim": 8}, False),
    ],
)
def test_a_store_may_grow_by_samples_splits_and_layers_alone(changes: dict[str, Any], may: bool) -> None:
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


@pytest.mark.parametrize(
    ("attributes", "is_legal"),
    [
        ({"skipped": {}, "extract_seconds": 0.0}, True),
        ({"skipped": {"a": "empty"}, "extract_seconds": 2, "forward_seconds": 1.5}, True),
        ({"skipped": [], "extract_seconds": 0.0}, False),
        ({"extract_seconds": 0.0}, False),
        ({"skipped": {}}, False),
        ({"skipped": {}, "extract_seconds": -1.0}, False),
        ({"skipped": {}, "extract_seconds": True}, False),
        ({"skipped": {}, "extract_seconds": "1"}, False),
        ({"skipped": {}, "extract_seconds": 1e15}, False),
    ],
)
def test_a_log_has_reasons_and_costs(attributes: dict[str, Any], is_legal: bool) -> None:
    assert is_log(attributes) is is_legal


@pytest.mark.parametrize("shape", [[-1], [1.5], [True], ["3"], "3", None])
def test_the_shape_of_an_array_is_whole_numbers(shape: Any, tmp_path: Path) -> None:
    kvstore = small_store.kvstore_at(tmp_path)
    kvstore.write_node("a", {"zarr_format": 3, "node_type": "array", "shape": shape, "attributes": {}})
    with pytest.raises(JobError, match=r"a/zarr\.json is not that of an array"):
        open_array(kvstore, "a")


def test_an_array_of_more_samples_is_accepted_only_where_a_store_may_have_grown(tmp_path: Path) -> None:
    kvstore = small_store.kvstore_at(tmp_path)
    long, short = (
        array_metadata(shape=[n], file_shape=[2], dtype="uint8", dimension_names=["sample"], codecs=chunk_codecs(None))
        for n in (4, 3)
    )
    create_array(kvstore, "a", long)
    assert open_array(kvstore, "a", short, may_be_longer=True).shape == (4,)
    with pytest.raises(JobError, match=r"its shape is \[4\], should be \[3\]"):
        open_array(kvstore, "a", short)


def test_options_are_not_converted() -> None:
    with pytest.raises(pydantic.ValidationError, match="valid integer"):
        StoreConfig.model_validate({"shard_samples": "5"})


def test_a_section_of_the_configuration_does_not_change() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        StoreConfig().path = "other.zarr"  # type: ignore[misc]
