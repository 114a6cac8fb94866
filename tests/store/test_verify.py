"""`verify` lists all damage at once; unmarking damaged shards and extracting them again repairs it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import small_store
import torch
from small_store import LAYERS, contents, expected

from adapt.features.cached import ResidentFeatures, StreamedFeatures
from store.array_io import open_array, write_array, write_strings
from store.arrays import require_store
from store.errors import JobError
from store.reader import open_store
from store.verify import verify_store
from store.verify_report import Damage, Report, damaged_shards, print_report
from store.writer import StoreWriter
from store.zarr_metadata import array_metadata, chunk_codecs

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A complete int8 store with a skipped sample; its two splits have equal sizes."""
    with mock.patch.dict(small_store.SIZES, test=5):
        small_store.complete(tmp_path / "cache.zarr", small_store.schema("int8"), skip=[1])
    return tmp_path / "cache.zarr"


def spoil(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def exchange(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def places(report: Report) -> list[tuple[str, int | None, int]]:
    return [(damage.split, damage.layer, damage.shard) for damage in report.damaged]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_whole_store_is_sound(tmp_path: Path, dtype: str, multi_label: bool) -> None:
    wanted = small_store.schema(dtype, "zstd", multi_label)
    for place in (tmp_path / "c.zarr", f"memory://verify-{dtype}-{multi_label}/c.zarr"):
        store = small_store.complete(place, wanted, skip=[0, 3])
        report = verify_store(place)
        found = report.document()
        assert found == json.loads(json.dumps(found))
        n_bytes = found.pop("bytes_read")
        assert n_bytes > 7 * wanted.bytes_per_sample
        whole = {"ok": True, "complete": True, "damaged": [], "faults": [], "notes": []}
        assert found == {"store": store.url.removeprefix("file://"), **whole}


def test_all_damage_is_listed_at_once_with_split_layer_rows_and_file(path: Path) -> None:
    spoil(path / "train/layer_00/c/1/0/0", 3)
    spoil(path / "train/layer_02/c/2/0/0")
    (path / "train/scale_02/c/0/0").write_bytes(b"")
    (path / "test/layer_00/c/1/0/0").unlink()
    spoil(path / "test/status/c/2")
    spoil(path / "test/shard_digest/c/0/0")
    spoil(path / "test/label/c/0")
    spoil(path / "tail/norm.weight/c/0")
    (path / "rms/layer_00/zarr.json").unlink()
    report = verify_store(path)
    assert places(report) == [
        ("train", 2, 0),
        ("train", 0, 1),
        ("train", 2, 2),
        ("test", None, 0),
        ("test", 0, 1),
        ("test", None, 2),
    ]
    assert damaged_shards(report) == {"test": [0, 1, 2], "train": [0, 1, 2]}
    missing = report.document()["damaged"][4]
    assert "is missing" in missing.pop("reason")
    assert missing == {"split": "test", "layer": 0, "shard": 1, "rows": [2, 4], "file": "test/layer_00/c/1/0/0"}
    assert [fault.removeprefix(f"{path}/").split("; ")[0] for fault in report.faults] == [
        "rms/layer_00/zarr.json is missing",
        "tail/norm.weight/c/0 is damaged, or another array's: its content is not what tail/norm.weight/zarr.json says",
        "test/label/c/0 is damaged, or another array's: its content is not what test/label/zarr.json says",
    ]
    assert not report.ok


def test_damaged_metadata_are_listed_and_everything_else_still_checked(path: Path) -> None:
    for name in ("train/layer_00/zarr.json", "test/status/zarr.json", "tail/zarr.json", "_log/zarr.json"):
        spoil(path / name, 40)
    spoil(path / "train/layer_02/c/1/0/0", 3)
    report = verify_store(path)
    assert len(report.faults) == 4
    assert places(report) == [("train", 2, 1)]
    assert not report.complete  # without marks it is unknown what test holds


def test_a_store_that_lost_its_root_is_a_fault_and_an_empty_place_is_none(path: Path, tmp_path: Path) -> None:
    (path / "zarr.json").write_text("{")
    spoil(path / "train/label/zarr.json", 40)
    assert [fault.split("; ")[0].split("zarr.json ")[1][:10] for fault in verify_store(path).faults] == [
        "was damage",
        "is damaged",
    ]
    (path / "zarr.json").unlink()
    shutil.rmtree(path / "train")
    assert verify_store(path).faults == [
        f"{path}/zarr.json is missing: without it this is not a store; extract it again"
    ]
    with pytest.raises(JobError, match="there is no store at"):
        verify_store(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("train/layer_00/c/0/0/0", "train/layer_02/c/0/0/0", [("train", 0, 0), ("train", 2, 0)]),
        ("train/layer_00/c/0/0/0", "train/layer_00/c/1/0/0", [("train", 0, 0), ("train", 0, 1)]),
        ("train/scale_02/c/1/0", "test/scale_02/c/1/0", [("train", 2, 1), ("test", 2, 1)]),
        ("train/status/c/0", "train/status/c/1", [("train", k, shard) for shard in (0, 1) for k in LAYERS]),
    ],
)
def test_whole_files_in_each_others_place_are_found_though_every_checksum_fits(
    path: Path, first: str, second: str, found: list[tuple[str, int, int]]
) -> None:
    exchange(path / first, path / second)
    open_store(path).read("train", slice(None))
    report = verify_store(path)
    assert places(report) == found
    assert "not those that were committed: files were exchanged" in report.damaged[0].reason


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train/sample_id/c/0", "test/sample_id/c/0"),
        ("rms/layer_00/c/0", "tail/norm.weight/c/0"),
        ("train/sample_id/zarr.json", "train/layer_00/zarr.json"),  # of another shape and kind
    ],
)
def test_small_arrays_in_each_others_place_are_refused_when_read(path: Path, first: str, second: str) -> None:
    exchange(path / first, path / second)
    damaged = "is damaged, or another array's: its content is not what"
    with pytest.raises(JobError, match=damaged if "/c/" in first else "sample_id/c/0/0/0 is missing"):
        open_store(path).sample_ids("train") if "sample_id" in first else open_store(path).read("train", [0])
    assert not verify_store(path).ok


def test_a_whole_array_in_anothers_place_is_refused(path: Path) -> None:
    (path / "train/label").rename(path / "label")
    (path / "test/label").rename(path / "train/label")
    with pytest.raises(JobError, match=r"train/label/c/0 is damaged, or another array's"):
        open_store(path).labels("train")


def test_an_incomplete_store_is_sound_and_what_lies_in_it_uncommitted_is_noted(tmp_path: Path) -> None:
    wanted, path = small_store.schema(), tmp_path / "c.zarr"
    writer = small_store.create(path, wanted)
    small_store.commit(path, writer, wanted, "train", 0, ())
    small_store.commit(path, writer, wanted, "train", 1, ())
    (path / "train/status/c/1").unlink()
    report = verify_store(path)
    assert (report.ok, report.complete) == (True, False)
    assert report.notes == ["3 files are in shard 1 of train, which is not committed"]


def write_marks(path: Path, values: list[int]) -> None:
    marks = open_array(small_store.kvstore_at(path), "train/status")
    marks[2:4].write(np.array(values, np.uint8)).result()


@pytest.mark.parametrize(("marks", "named"), [([1, 7], "1, 7"), ([0, 1], "0, 1"), ([2, 0], "0, 2")])
def test_marks_that_no_commit_writes_are_damage(path: Path, marks: list[int], named: str) -> None:
    write_marks(path, marks)
    (damage,) = verify_store(path).damaged
    assert damage == Damage(
        split="train",
        layer=None,
        shard=1,
        rows=(2, 4),
        file="train/status/c/1",
        reason=f"its marks are [{named}]; legal: 1 and 2",
    )


def test_labels_and_ids_that_make_no_sense_are_faults(path: Path) -> None:
    kvstore = small_store.kvstore_at(path)
    write_array(kvstore, "train/label", np.array([0, 1, 2, 3, -1]), ["sample"])
    write_array(kvstore, "test/label", np.zeros(4, np.int64), ["sample"])
    write_array(kvstore, "rms/layer_02", np.zeros(4, np.float32), ["channel"])
    write_array(kvstore, "train/sample_digest", np.zeros((5, 16), np.int16), ["sample", "byte"])
    write_strings(kvstore, "train/sample_id", ["a", "b", "a", "b", "c"], "sample")
    write_strings(kvstore, "test/sample_id", ["a"], "sample")
    kvstore.write_group("tail", {"extract_seconds": 1.0})
    faults = [fault.removeprefix(f"{path}/") for fault in verify_store(path).faults]
    assert faults == [
        "tail/zarr.json is another group's",
        "rms/layer_02 has values that are not positive",
        "train/label has labels from -1 to 3; legal: 0 to 2",
        "train/sample_digest holds int16 (5, 16); should be uint8 (5, 16)",
        "train/sample_id has 2 ids more than once, such as 'a'",
        "test/label holds int64 (4,); should be int64 (5,)",
        "test/sample_id has 1 ids for 5 samples",
    ]


def test_metadata_of_another_shape_are_refused_before_anything_is_allocated(path: Path) -> None:
    kvstore = small_store.kvstore_at(path)
    for name, shape in (("train/layer_00", [2**40, 5, 4]), ("train/status", [2**50]), ("train/shard_digest", [9, 2])):
        kvstore.write_node(name, array_metadata(shape, shape, "uint8", ["a"] * len(shape), chunk_codecs(None)))
    refused = r"status/zarr\.json is not that of this array: its shape is \[1125899906842624\], should be \[5\]; delete"
    with pytest.raises(JobError, match=refused):
        open_store(path)
    assert len(verify_store(path).faults) == 3


def test_strays_are_noted(path: Path) -> None:
    for name in ("train/layer_00/c/0/0/0.__lock", "notes[1].txt", "train/label/d"):
        (path / name).write_text("x")
    report = verify_store(path)
    assert report.ok
    assert report.notes == [
        "notes[1].txt is not part of the store",
        "train/label/d is not part of the store",
        "train/layer_00/c/0/0/0.__lock is a temporary file of a write that was killed or is in progress; harmless",
    ]


def test_the_printed_report_has_a_line_for_every_finding(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(verify_store(path))
    assert capsys.readouterr().out.startswith(f"{path}/: sound; complete; ")
    spoil(path / "train/layer_02/c/1/0/0", 3)
    spoil(path / "test/status/c/2")
    spoil(path / "test/label/c/0")
    (path / "[red]").touch()
    print_report(verify_store(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("damaged: shard 1 of train (rows 2 to 3), layer 2: train/layer_02/c/1/0/0: DATA_LOSS")
    assert lines[1].startswith("damaged: shard 2 of test (rows 4 to 4), all layers: test/status/c/2: ")
    assert lines[2].startswith(f"fault: {path}/test/label/c/0 is damaged")
    assert lines[3] == "note: [red] is not part of the store"
    assert lines[4].startswith(f"{path}/: 2 damaged files, 1 faults; complete; ")


def lose_index(path: Path) -> None:
    spoil(path / "train/layer_02/c/2/0/0")  # a short last shard: replacing it would read it first


def lose_marks(path: Path) -> None:
    (path / "train/status/c/0").write_bytes(b"")


def lose_file(path: Path) -> None:
    (path / "train/scale_00/c/1/0").unlink()


def lose_digest(path: Path) -> None:
    spoil(path / "train/shard_digest/c/2/0")


def lose_place(path: Path) -> None:
    exchange(path / "train/layer_00/c/2/0/0", path / "train/layer_02/c/2/0/0")


@pytest.mark.parametrize("lose", [lose_index, lose_marks, lose_file, lose_digest, lose_place])
def test_unmarking_damaged_shards_and_extracting_them_again_restores_every_byte(
    path: Path, lose: Callable[[Path], None]
) -> None:
    whole = contents(path)
    lose(path)
    (wanted,) = damaged_shards(verify_store(path)).values()
    kvstore = small_store.kvstore_at(path)
    writer = StoreWriter(kvstore, require_store(kvstore))
    writer.unmark("train", wanted)
    assert writer.missing_shards("train") == wanted
    report = verify_store(path)
    assert (report.ok, report.complete, report.notes) == (True, False, [])
    with mock.patch.dict(small_store.SIZES, test=5):
        small_store.complete(path, small_store.schema("int8"), skip=[1])
    assert contents(path) == whole


def test_a_crash_while_unmarking_leaves_a_shard_missing_or_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(path / "train/layer_02/c/1/0/0", 3)
    kvstore = small_store.kvstore_at(path)
    writer = StoreWriter(kvstore, require_store(kvstore))
    monkeypatch.setattr(type(kvstore), "remove", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.unmark("train", [1])
    assert open_store(path).missing_shards("train") == [1]


@pytest.mark.parametrize("kind", [StreamedFeatures, ResidentFeatures])
def test_training_on_a_damaged_shard_stops_with_its_name(tmp_path: Path, kind: type) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema(tail_tensors=()))
    spoil(tmp_path / "c.zarr/train/layer_02/c/1/0/0", 3)
    named = r"shard 1 of train: cannot read layer 2 of .*c\.zarr/train.*layer_02/c/1/0/0.*`sidecache verify` lists all"
    with pytest.raises(JobError, match=named):  # noqa: PT012
        features = StreamedFeatures(store, CPU)
        if kind is ResidentFeatures:
            features = ResidentFeatures(features, [2])  # type: ignore[assignment]
        list(features.batches("train", [np.arange(5)], [2]))
    np.testing.assert_array_equal(store.read("train", [0, 4], [2])[2], expected("train", 2, "float32")[[0, 4]])


def test_a_store_of_no_samples_is_sound(tmp_path: Path) -> None:
    with mock.patch.dict(small_store.SIZES, test=0):
        small_store.complete(tmp_path / "c.zarr", small_store.schema("int8"))
        store = open_store(tmp_path / "c.zarr")
        assert (store.sample_ids("test"), store.labels("test").shape) == ([], (0,))
    report = verify_store(tmp_path / "c.zarr")
    assert (report.ok, report.complete, report.notes) == (True, True, [])
