"""A store marks the samples of the source's own validation split, and refuses damaged marks; other stores have none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_store
import zarr

from extract.job.store_schema import sample_digests
from store.array_io import write_array
from store.compare import Samples, refuse_changed_samples, require_same
from store.errors import ChangedError, JobError, OtherStoreError
from store.inspect import describe_store
from store.listing import Listing, read_listing
from store.reader import Store, open_store
from store.schema import Schema
from store.verify import verify_store

MARKED = small_store.schema(val_split="val")
N_TRAIN = small_store.SIZES["train"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A complete store of 5 training rows, of which rows 1 and 3 are for validation, and row 0 was skipped."""
    small_store.complete(tmp_path / "c.zarr", MARKED, skip=[0])
    return tmp_path / "c.zarr"


def rows_of(store: Store) -> list[int]:
    rows = store.validation_rows()
    assert rows is not None
    return rows.tolist()


def test_validation_rows_leave_out_skipped_samples(path: Path) -> None:
    store = open_store(path)
    ids = store.sample_ids("train")
    assert [ids[row] for row in rows_of(store)] == ["train/ünïcode 1.png", "train/ünïcode 3.png"]
    assert rows_of(store) == [0, 2]
    assert rows_of(Store.from_snapshot(store.snapshot())) == [0, 2]
    assert store.listing("train").validation is not None
    assert store.listing("test").validation is None


def test_any_zarr_reader_sees_the_marks(path: Path) -> None:
    group = zarr.open_group(path, mode="r")
    assert group.attrs["val_split"] == "val"
    assert np.asarray(group["train/validation"]).tolist() == [0, 1, 0, 1, 0]
    assert "validation" not in group["test"]  # type: ignore[operator]


def test_a_store_with_marks_is_sound(path: Path) -> None:
    report = verify_store(path)
    assert (report.ok, report.complete, report.notes) == (True, True, [])


def test_a_description_counts_validation_samples(path: Path) -> None:
    found = describe_store(open_store(path))
    assert found["val_split"] == "val"
    assert {split: facts["validation"] for split, facts in found["splits"].items()} == {"train": 2, "test": None}


def test_a_store_without_a_validation_split_has_no_trace_of_it(tmp_path: Path) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema())
    assert store.validation_rows() is None
    assert store.listing("train").validation is None
    assert not (tmp_path / "c.zarr/train/validation").exists()
    assert "val_split" not in json.loads((tmp_path / "c.zarr/zarr.json").read_text())["attributes"]
    assert describe_store(store)["splits"]["train"]["validation"] is None


def test_a_schema_survives_its_document() -> None:
    for schema in (MARKED, small_store.schema()):
        assert Schema.parse(schema.model_dump(mode="json"), "here") == schema


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 1, 0, 2, 0], np.uint8), "has marks up to 2; legal: 0 and 1"),
        (np.array([0, 1, 0], np.uint8), r"lists 3 samples|holds uint8 \(3,\); should be uint8 \(5,\)"),
        (np.zeros(5, np.int64), r"holds int64 \(\d,\); should be uint8"),
    ],
)
def test_illegal_marks_are_refused(path: Path, values: np.ndarray, message: str) -> None:
    kvstore = small_store.kvstore_at(path)
    write_array(kvstore, "train/validation", values, ["sample"])
    with pytest.raises(JobError, match=f"train/validation.*({message})"):
        open_store(path).validation_rows()
    with pytest.raises(JobError, match="train/validation"):
        read_listing(kvstore, "train", marks_validation=True)
    (fault,) = verify_store(path).faults
    assert "train/validation" in fault


def test_missing_and_damaged_marks_are_refused(path: Path) -> None:
    chunk = path / "train/validation/c/0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(JobError, match="train/validation"):
        open_store(path).validation_rows()
    assert not verify_store(path).ok
    shutil.rmtree(path / "train/validation")
    with pytest.raises(JobError, match="train/validation"):
        open_store(path).validation_rows()
    assert not verify_store(path).ok


def test_another_validation_split_is_another_store() -> None:
    with pytest.raises(OtherStoreError, match="val_split: stored 'val', wanted ''"):
        require_same(MARKED, small_store.schema(), "here")


def test_a_sample_that_moved_is_refused() -> None:
    listing = small_store.listing("train", marks_validation=True)
    assert listing.validation is not None
    moved = Listing(listing.ids, listing.labels, listing.digests, np.roll(listing.validation, 1))
    stored, current = (Samples(MARKED.classes, {"train": each}) for each in (listing, moved))
    with pytest.raises(ChangedError, match=r"train: 4 \(.*\) moved between training and validation"):
        refuse_changed_samples(stored, current, "here", "")
    refuse_changed_samples(stored, stored, "here", "")


def test_marks_are_part_of_the_digest_of_the_samples() -> None:
    plain, marked = (small_store.listing("train", marks_validation=marks) for marks in (False, True))
    digests = [sample_digests({"train": each})["train"] for each in (plain, marked)]
    assert digests[0] == "9e75d72dc0d63396679703c775893c50"  # as before there were marks
    assert digests[0] != digests[1]
