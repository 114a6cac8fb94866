"""Predictions come back as they were written; a damaged, edited or exchanged file is refused with one message."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_predictions import make_multi_label, make_predictions
from result_rows import make_row

from adapt.run_dir.predictions import (
    Predictions,
    find_predictions,
    predictions_path,
    read_predictions,
    write_predictions,
)
from store.errors import JobError, UserError

LOGITS = st.floats(-(2.0**99), 2.0**99, width=32)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def fields_of_predictions(draw: st.DrawFn) -> dict[str, Any]:
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    is_multi_label = draw(st.booleans())
    single = arrays(np.int64, n, elements=st.integers(0, k - 1))
    several = arrays(np.uint8, (n, k), elements=st.integers(0, 1))
    return {
        "trial_id": "0123456789abcdef",
        "classes": tuple(draw(st.lists(NAMES, min_size=k, max_size=k))),
        "sample_ids": tuple(draw(st.lists(NAMES, min_size=n, max_size=n))),
        "labels": draw(several if is_multi_label else single),
        "logits": draw(arrays(np.float32, (n, k), elements=LOGITS)),
    }


@settings(max_examples=50, deadline=None)
@given(fields=fields_of_predictions())
def test_predictions_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]):
    made = Predictions(**fields)
    path = tmp_path_factory.getbasetemp() / "predictions" / "a.parquet"
    write_predictions(path, made)
    read = read_predictions(path)
    assert (read.trial_id, read.classes, read.sample_ids) == (made.trial_id, made.classes, made.sample_ids)
    for name in ("labels", "logits"):
        found, expected = getattr(read, name), getattr(made, name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    assert list(path.parent.iterdir()) == [path]


def test_any_parquet_reader_finds_plain_columns(tmp_path: Path):
    write_predictions(tmp_path / "a.parquet", make_predictions(np.array([True, False])))
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == [
        {"sample_id": "0.png", "label": 0, "logits": [1.0, 0.0, 0.0]},
        {"sample_id": "1.png", "label": 1, "logits": [0.0, 0.0, 1.0]},
    ]


def test_equal_predictions_are_equal_files(tmp_path: Path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        write_predictions(path, make_predictions(np.ones(9, bool)))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int):
    path, made = tmp_path_factory.getbasetemp() / "flip.parquet", make_predictions(np.arange(20) % 3 > 0)
    write_predictions(path, made)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    read = None
    with suppress(UserError):
        read = read_predictions(path)
    if read is not None:  # a byte that no value depends on, such as a statistic of a column
        assert read.checksum == made.checksum
        np.testing.assert_array_equal(read.logits, made.logits)


def rewrite(path: Path, change) -> None:
    """Write a file again as another program would, with its metadata kept."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, compression="none")


def edit_label(table: pa.Table) -> pa.Table:
    return table.set_column(1, "label", pa.array([2, *table["label"].to_pylist()[1:]]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_label, "does not match its checksum"),
        (lambda table: table.drop_columns(["label"]), "it has the columns"),
        (lambda table: table.set_column(1, "label", pa.array(["x"] * table.num_rows)), "it has the columns"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, change, reason: str):
    path = tmp_path / "a.parquet"
    write_predictions(path, make_predictions(np.ones(9, bool)))
    rewrite(path, change)
    with pytest.raises(UserError, match=rf"a\.parquet is damaged \(.*{reason}.*\): delete it"):
        read_predictions(path)


@pytest.mark.parametrize("name", [b"sidecache.trial_id", b"sidecache.classes", b"sidecache.checksum"])
def test_metadata_that_lack_or_changed_are_refused(tmp_path: Path, name: bytes):
    path = tmp_path / "a.parquet"
    write_predictions(path, make_predictions(np.ones(9, bool)))
    table = pq.read_table(path)
    for metadata in (
        {**table.schema.metadata, name: b'["x"]'},
        {k: v for k, v in table.schema.metadata.items() if k != name},
    ):
        pq.write_table(table.replace_schema_metadata(metadata), path, compression="none")
        with pytest.raises(UserError, match="is damaged"):
            read_predictions(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 99])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read_predictions(tmp_path / "a.parquet")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a regular file"):
        read_predictions(tmp_path / "a.parquet")


def test_a_small_file_may_not_claim_many_samples(tmp_path: Path):
    rows, width = 10_000, 100
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width, np.float32)), width)
    columns = [pa.array(["a"] * rows), pa.array(np.zeros(rows, np.int64)), lists]
    pq.write_table(
        pa.table(columns, names=["sample_id", "label", "logits"]), tmp_path / "a.parquet", compression="zstd"
    )
    with pytest.raises(UserError, match="it claims 10,000 samples"):
        read_predictions(tmp_path / "a.parquet")


def test_a_missing_file_says_who_writes_it(tmp_path: Path):
    with pytest.raises(UserError, match=r"no predictions at .*`sidecache run` writes them"):
        read_predictions(tmp_path / "a.parquet")


def test_predictions_of_a_row_are_those_of_its_trial(tmp_path: Path):
    row = make_row(trial_id="0123456789abcdef")
    assert find_predictions(tmp_path, row) is None
    write_predictions(predictions_path(tmp_path, row), make_predictions(np.ones(3, bool), row.trial_id))
    found = find_predictions(tmp_path, row)
    assert found is not None
    assert found.trial_id == row.trial_id
    with pytest.raises(UserError, match="it is of trial 0123456789abcdef, not 01234567"):
        find_predictions(tmp_path, row.model_copy(update={"trial_id": "01234567ffffffff"}))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    write_predictions(path, make_predictions(np.ones(3, bool)))
    before = path.read_bytes()

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("store.local.durable_files.os.fsync", refuse)
    with pytest.raises(JobError, match=r"a\.parquet cannot be written \(No space left on device\)"):
        write_predictions(path, make_predictions(np.zeros(3, bool)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("n_samples", "label", "width", "message"),
    [
        (1, 0, 3, "do not match"),
        (0, 0, 2, "there are no samples"),
        (1, 2, 2, "a label is not between 0 and 1"),
        (1, -1, 2, "a label is not between 0 and 1"),
    ],
)
def test_predictions_that_contradict_themselves_are_refused(n_samples: int, label: int, width: int, message: str):
    with pytest.raises(ValueError, match=message):
        Predictions(
            trial_id="t",
            classes=("a", "b"),
            sample_ids=("0",) * n_samples,
            labels=np.full(n_samples, label, np.int64),
            logits=np.zeros((n_samples, width), np.float32),
        )


def test_multi_label_predictions_hold_zeros_and_ones(tmp_path: Path):
    labels = np.array([[0, 1], [1, 1], [0, 0]])
    write_predictions(tmp_path / "a.parquet", make_multi_label(np.ones((3, 2)), labels))
    assert pq.read_table(tmp_path / "a.parquet")["label"].to_pylist() == labels.tolist()
