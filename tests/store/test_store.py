"""Opening and reading a store, by `open_store` and by plain zarr and tensorstore."""

import inspect
import json
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import small_store
import tensorstore as ts
import zarr
from small_store import DIM, LAYERS, RMS, SIZES, TAIL, TOKENS, expected, listing
from torch.utils.data import DataLoader

from store import row_indices
from store.config import Compressor, Dtype
from store.errors import JobError, UserError
from store.inspect import describe_store, print_store
from store.reader import Store, open_store
from store.schema import FORMAT_VERSION

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
COMPRESSORS: tuple[Compressor | None, ...] = (None, "zstd", "gzip", "blosc")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return small_store.complete(tmp_path / "cache.zarr", small_store.schema())


def plain_values(stored: Any, group: Any, split: str, layer: int, dtype: Dtype) -> np.ndarray:
    """Decode as the attributes of the arrays say."""
    if dtype == "bfloat16":
        assert group[f"{split}/layer_{layer:02d}"].attrs["encoding"] == "bfloat16"
        return stored.view(ml_dtypes.bfloat16).astype(np.float32)
    if dtype == "int8":
        assert group[f"{split}/layer_{layer:02d}"].attrs["encoding"] == "q * (|q| + 64) * scale * rms"
        q = stored.astype(np.float32)
        scale, rms = group[f"{split}/scale_{layer:02d}"][:][..., None], group[f"rms/layer_{layer:02d}"][:]
        return q * (np.abs(q) + 64) * scale * rms
    if dtype == "int4":
        attributes = group[f"{split}/layer_{layer:02d}"].attrs
        assert attributes["encoding"].startswith("q * (|q| + 4) * scale * rms, in blocks of channels")
        scale, low_codes, high_codes = stored[..., :2].copy().view("<f2"), stored[..., 2:] & 15, stored[..., 2:] >> 4
        q = np.concatenate([low_codes, high_codes], axis=-1).astype(np.float32)  # one block of four channels
        q -= 16 * (q > 7)
        return q * (np.abs(q) + 4) * (scale.astype(np.float32) * group[f"rms/layer_{layer:02d}"][:])
    return stored.astype(np.float32)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_zarr_and_tensorstore_read_the_same_values(
    tmp_path: Path, dtype: Dtype, compressor: Compressor | None
) -> None:
    store = small_store.complete(tmp_path / "cache.zarr", small_store.schema(dtype, compressor))
    group: Any = zarr.open_group(tmp_path / "cache.zarr", mode="r")
    for split, n in SIZES.items():
        assert list(group[f"{split}/sample_id"][:]) == list(listing(split).ids) == store.sample_ids(split)
        np.testing.assert_array_equal(group[f"{split}/label"][:], listing(split).labels)
        np.testing.assert_array_equal(group[f"{split}/sample_digest"][:], listing(split).digests)
        ours = store.read(split, range(n))
        for layer in LAYERS:
            name = f"{split}/layer_{layer:02d}"
            assert group[name].metadata.dimension_names == ("sample", "token", "dim")
            spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/cache.zarr/{name}/"}
            by_tensorstore = ts.open(spec, open=True).result().read().result()
            np.testing.assert_array_equal(group[name][:], by_tensorstore)
            np.testing.assert_array_equal(plain_values(group[name][:], group, split, layer, dtype), ours[layer])
            np.testing.assert_array_equal(ours[layer], expected(split, layer, dtype))
    for name, values in TAIL.items():
        np.testing.assert_array_equal(group[f"tail/{name}"][:], values)


def test_consolidated_metadata_are_no_damage(store: Store) -> None:
    with pytest.warns(UserWarning, match="[Cc]onsolidated"):
        zarr.consolidate_metadata(store.url.removeprefix("file://"))
    assert open_store(store.url).schema == store.schema


def test_rows_come_in_the_order_asked_with_repeats(store: Store) -> None:
    rows = [4, 0, 0, 3]
    for given in (rows, np.array(rows), np.array(rows, np.uint8), tuple(rows)):
        for layer, values in store.read("train", given).items():
            np.testing.assert_array_equal(values, expected("train", layer, "float32")[rows])


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(None, None, -2), slice(-2, None), slice(9, 20)])
def test_slices_are_those_of_python(store: Store, rows: slice) -> None:
    np.testing.assert_array_equal(store.read("train", rows)[2], expected("train", 2, "float32")[rows])


def test_a_subset_of_the_layers(store: Store) -> None:
    assert list(store.read("train", [1], [2])) == [2]
    assert list(store.read("train", [1])) == list(store.layers) == list(LAYERS)


def test_no_rows_are_read_from_nowhere(tmp_path: Path) -> None:
    small_store.create(tmp_path / "empty.zarr", small_store.schema("int8"))
    for rows in ([], slice(0), np.zeros(0, np.int64)):
        assert open_store(tmp_path / "empty.zarr").read("test", rows)[0].shape == (0, TOKENS, DIM)


@pytest.mark.parametrize("rows", [[5], [-1], [True, False]])
def test_rows_that_do_not_exist_are_refused(store: Store, rows: Any) -> None:
    with pytest.raises(UserError, match="indices from 0 to 4 in 'train', got"):
        store.read("train", rows)


@pytest.mark.parametrize("rows", [[0.5], ["0"], [[0]], np.zeros(5, bool)])
def test_rows_of_another_kind_are_refused_where_types_go_unchecked(rows: Any) -> None:
    with pytest.raises(UserError, match="indices from 0 to 4 in 'train', got"):
        inspect.unwrap(row_indices.check_indices)(rows, 5, "train")


def test_an_unknown_split_or_layer_names_what_is_legal(store: Store) -> None:
    with pytest.raises(UserError, match="there is no split 'val'; legal: train, test"):
        store.read("val", [0])
    with pytest.raises(UserError, match="there is no split 'val'"):
        store.labels("val")
    with pytest.raises(UserError, match=r"layers \[1, 7\] are not in this store, which holds \[0, 2\]"):
        store.read("train", [0], [7, 0, 1])


def test_skipped_samples_are_left_out_of_rows_labels_and_ids(tmp_path: Path) -> None:
    store = small_store.complete(tmp_path / "s.zarr", small_store.schema("int8"), skip=[0, 2, 3])
    kept = [1, 4]
    assert store.num_samples("train") == 2
    assert store.sample_ids("train") == [listing("train").ids[row] for row in kept]
    np.testing.assert_array_equal(store.labels("train"), listing("train").labels[kept])
    np.testing.assert_array_equal(store.read("train", [0, 1])[2], expected("train", 2, "int8")[kept])
    assert store.skipped("train") == {listing("train").ids[row]: "it is no image" for row in (0, 2, 3)}
    assert store.skipped("test") == {}
    with pytest.raises(UserError, match="indices from 0 to 1 in 'train'"):
        store.read("train", [2])


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_data_loader_without_workers_sees_every_sample(tmp_path: Path, multi_label: bool) -> None:
    store = small_store.complete(tmp_path / "s.zarr", small_store.schema(multi_label=multi_label))
    batches = list(DataLoader(store.dataset("train", [2]), batch_size=2))
    np.testing.assert_array_equal(np.concatenate([b[0][2] for b in batches]), expected("train", 2, "float32"))
    np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), listing("train", multi_label).labels)


def test_a_loop_over_the_dataset_ends(store: Store) -> None:
    dataset = store.dataset("train")
    assert len(list(dataset)) == len(dataset) == SIZES["train"]  # type: ignore[call-overload]
    with pytest.raises(IndexError, match="row 5 is outside 0 to 4"):
        dataset[5]


@pytest.mark.slow
def test_a_data_loader_worker_started_afresh_reads_the_same(store: Store) -> None:
    loader = DataLoader(store.dataset("train"), batch_size=5, num_workers=1, multiprocessing_context="spawn")
    (tokens, labels) = next(iter(loader))
    np.testing.assert_array_equal(tokens[0], expected("train", 0, "float32"))
    np.testing.assert_array_equal(labels, listing("train").labels)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_is_told_how_to_start_workers(store: Store) -> None:
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            store.dataset("train")
        except UserError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert "DataLoader(..., multiprocessing_context='forkserver'), or 'spawn'" in pipe.read()


def test_a_pickled_store_reads_the_same_rows(store: Store) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    np.testing.assert_array_equal(again.read("test", [1])[0], expected("test", 0, "float32")[[1]])


@pytest.mark.parametrize("name", ["a b/ünï çode %20 #1?.zarr", "plain.zarr/", "deep/er/still.zarr"])
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    small_store.complete(f"{tmp_path}/{name}", small_store.schema("int8"))
    store = open_store(Path(f"{tmp_path}/{name}"))
    np.testing.assert_array_equal(store.read("train", [3])[2], expected("train", 2, "int8")[[3]])
    assert store.n_bytes() == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())


def test_urls(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/url.zarr", "memory://tests/cache.zarr/"):
        small_store.complete(url, small_store.schema())
        np.testing.assert_array_equal(open_store(url).read("test", [0])[0], expected("test", 0, "float32")[:1])
    assert open_store("memory://tests/cache.zarr").n_bytes() > 0


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small_store.complete("~/cache.zarr", small_store.schema())
    assert open_store("cache.zarr").num_samples("train") == 5


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"store\.path is empty"):
        open_store(path)


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"there is no store at {tmp_path}/; make one with `sidecache extract`"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match=r"there is no store at .*/file/"):
        open_store(tmp_path / "file")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match=r"other\.zarr/ is not a token store"):
        open_store(tmp_path / "other.zarr")
    with pytest.raises(UserError, match=r"unsupported URL scheme.*; legal are a folder, file://, s3://, gs://"):
        open_store("ftp://x/y")


@pytest.mark.parametrize("content", ["[]", "{}", '{"attributes": null}', '{"attributes": [1]}', "null"])
def test_some_other_json_is_no_store(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(UserError, match="is not a token store"):
        open_store(tmp_path)


def test_a_newer_format_is_refused(store: Store) -> None:
    root = Path(store.url.removeprefix("file://")) / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["format_version"] = FORMAT_VERSION + 1
    root.write_text(json.dumps(document))
    with pytest.raises(
        UserError,
        match=rf"is a store of format {FORMAT_VERSION + 1}, this sidecache reads and writes {FORMAT_VERSION}; install",
    ):
        open_store(store.url)


def test_attributes_that_do_not_fit_name_the_field(store: Store) -> None:
    kvstore = small_store.kvstore_at(store.url)
    kvstore.write_group("", {**(kvstore.read_group("") or {}), "num_views": 2})
    with pytest.raises(UserError, match=r"another version of sidecache \(num_views: Extra inputs .*extract to a new"):
        open_store(store.url)


def test_edited_attributes_are_refused(store: Store) -> None:
    root = Path(store.url.removeprefix("file://")) / "zarr.json"
    root.write_text(root.read_text().replace('"dim": 4', '"dim": 5'))
    with pytest.raises(JobError, match=r"zarr\.json was damaged, or edited by hand: its checksum does not fit; delete"):
        open_store(store.url)


def test_inspect_tells_contents_and_completeness(tmp_path: Path) -> None:
    wanted = small_store.schema("int8")
    writer = small_store.create(tmp_path / "c.zarr", wanted)
    small_store.commit(tmp_path / "c.zarr", writer, wanted, "train", 1, [2])
    facts = describe_store(open_store(tmp_path / "c.zarr"))
    assert not facts["complete"]
    assert facts["splits"]["train"]["missing_shards"] == [0, 2]
    assert facts["splits"]["train"]["skipped"] == {listing("train").ids[2]: "it is no image"}
    assert facts["bytes_per_sample"] == len(LAYERS) * TOKENS * (DIM + 4)
    assert json.loads(json.dumps(facts)) == facts


def test_the_table_shows_every_fact(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    description = describe_store(store)
    print_store(description)
    text = capsys.readouterr().out
    names = [key for key in description if key not in ("url", "splits", "provenance")]
    names += [f"split {split}" for split in store.splits]
    names += [f"provenance.{key}" for key in description["provenance"]]
    assert [name for name in names if name not in text] == []


def test_rms_and_tail_are_kept(tmp_path: Path) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema("int8"))
    assert {layer: rms.tolist() for layer, rms in store.rms.items()} == {k: v.tolist() for k, v in RMS.items()}
    for name, values in store.tail_arrays().items():
        np.testing.assert_array_equal(values, TAIL[name])


@pytest.mark.parametrize(("dtype", "n_bytes"), [("float32", 4 * DIM), ("float16", 2 * DIM), ("int8", DIM + 4)])
def test_bytes_are_those_of_the_chosen_rows_and_layers(dtype: Dtype, n_bytes: int) -> None:
    schema = small_store.schema(dtype)
    assert schema.bytes_per_sample == len(LAYERS) * TOKENS * n_bytes
    for layers in (LAYERS[:1], LAYERS):
        assert schema.bytes_of(7, layers) == 7 * len(layers) * TOKENS * n_bytes


def test_the_first_missing_shard_of_a_request_is_named(tmp_path: Path) -> None:
    wanted = small_store.schema()
    writer = small_store.create(tmp_path / "c.zarr", wanted)
    small_store.commit(tmp_path / "c.zarr", writer, wanted, "train", 1, [])
    with pytest.raises(JobError, match=r"shard 0 of train in .* is not extracted yet"):
        open_store(tmp_path / "c.zarr").read("train", [0, 4])
