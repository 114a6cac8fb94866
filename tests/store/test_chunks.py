"""Local files read directly: the same values, every checksum compared before use, every change of a file detected."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import psutil
import pytest
import small_store
from small_store import LAYERS, SIZES, expected

from benchmarks.made_up import StoreShape, write_store
from store import layer_reader
from store.config import Compressor, Dtype
from store.errors import JobError
from store.layer_reader import LayerReader
from store.local import chunks
from store.local import open_files as files
from store.local.buffers import Buffers
from store.local.open_files import OpenFiles
from store.reader import Store, open_store
from store.zarr_metadata import CRC32C

FILE = "train/layer_02/c/1/0/0"  # rows 2 and 3
ROW_BYTES = small_store.TOKENS * small_store.DIM * 4  # of float32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return small_store.complete(tmp_path / "cache.zarr", small_store.schema())


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all contents of which a checksum is computed."""
    lengths: list[int] = []
    computed = google_crc32c.value

    def value(content: np.ndarray) -> int:
        lengths.append(len(content))
        return int(computed(content))

    monkeypatch.setattr(chunks.google_crc32c, "value", value)
    return lengths


@pytest.fixture
def by_tensorstore(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The rows that were read through tensorstore."""
    asked: list[np.ndarray] = []
    through = LayerReader._read_tensorstore

    def noted(self: LayerReader, rows: np.ndarray) -> object:
        asked.append(rows)
        return through(self, rows)

    monkeypatch.setattr(LayerReader, "_read_tensorstore", noted)
    return asked


def assert_sound(store: Store, rows: list[int]) -> None:
    for number, values in store.read("train", rows).items():
        np.testing.assert_array_equal(values, expected("train", number, store.schema.dtype)[rows])


def flip(file: Path, place: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_plain_rows_are_read_without_tensorstore(
    tmp_path: Path, dtype: Dtype, by_tensorstore: list[np.ndarray]
) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema(dtype))
    for rows in ([4, 0, 0, 3], [2], list(range(5))):
        assert_sound(store, rows)
        assert_sound(store, rows)
    assert not by_tensorstore


@pytest.mark.parametrize("compressor", ["zstd", "blosc", "gzip"])
def test_compressed_rows_are_read_by_tensorstore(
    tmp_path: Path, compressor: Compressor, by_tensorstore: list[np.ndarray]
) -> None:
    assert_sound(small_store.complete(tmp_path / "c.zarr", small_store.schema("float32", compressor)), [4, 0])
    assert len(by_tensorstore) == len(LAYERS)


@pytest.fixture(scope="module")
def rows_of_numbers(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """450 small rows in shards of 400."""
    return write_store(
        tmp_path_factory.mktemp("numbers") / "c.zarr",
        StoreShape(samples=450, layers=1, grid=(1, 1), dim=8, shard_samples=400),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many buffers every read filled."""
    pieces: list[int] = []
    read = os.preadv

    def preadv(fd: int, buffers: list[np.ndarray], offset: int) -> int:
        pieces.append(len(buffers))
        return read(fd, buffers, offset)

    monkeypatch.setattr(chunks.os, "preadv", preadv)
    return pieces


ONE_AFTER_THE_OTHER = (
    list(range(450)),
    [7, 8, 9, 3, 4, 399, 400, 401],
    [5, 9, 13, 17, 30, 31, 31, 30],
    list(range(0, 400, 4)),
)


@pytest.mark.parametrize("rows", ONE_AFTER_THE_OTHER)
def test_neighbors_are_read_at_once_and_right(
    rows_of_numbers: Store, rows: list[int], by_tensorstore: list[np.ndarray]
) -> None:
    everything = rows_of_numbers._layer_reader("train", 0)._read_tensorstore(np.arange(450)).result()
    by_tensorstore.clear()
    for _ in range(2):  # before and after their checksums are known to be right
        read = rows_of_numbers.fetch("train", rows).result()[0]
        np.testing.assert_array_equal(read.values, everything[0][rows])
        np.testing.assert_array_equal(read.scale, everything[1][rows])
    assert not by_tensorstore


def test_a_read_takes_no_more_pieces_than_the_system_allows(rows_of_numbers: Store, calls: list[int]) -> None:
    rows_of_numbers.fetch("train", list(range(0, 400, 4))).result()
    assert len(calls) <= 2 * (1 + 2)  # values and scales: a shard's index and its rows
    assert max(calls) <= os.sysconf("SC_IOV_MAX")
    calls.clear()
    rows_of_numbers.fetch("train", list(range(400))).result()
    assert len(calls) == -(-400 // chunks._MAX_SPAN)  # the scales are kept


def test_scales_are_read_once_a_shard_and_again_when_their_file_changes(
    tmp_path: Path, calls: list[int], by_tensorstore: list[np.ndarray]
) -> None:
    store = write_store(tmp_path / "c.zarr", StoreShape(samples=6, layers=1, grid=(1, 1), dim=8))
    before = store.fetch("train", [1, 4]).result()[0].scale
    calls.clear()
    assert np.array_equal(store.fetch("train", [4]).result()[0].scale, before[1:])
    assert len(calls) == 1  # the values of one row
    flip(tmp_path / "c.zarr/train/scale_00/c/0/0", 2 * 4 + 1)
    with pytest.raises(JobError, match="shard 0 of train"):
        store.fetch("train", [0, 1, 2, 3, 4, 5]).result()
    np.testing.assert_array_equal(store.fetch("train", [1, 4]).result()[0].scale, before)
    assert by_tensorstore


@pytest.mark.parametrize("limit", [0, 2**20])
def test_scales_that_would_take_too_much_memory_are_read_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(chunks, "_MAX_CACHED_BYTES", limit)
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema("int8"))
    assert_sound(store, [4, 0, 0, 3])
    assert (store._layer_reader("train", LAYERS[0])._local[1]._cache is None) == (limit == 0)


def test_a_damaged_row_that_is_read_along_harms_nobody(tmp_path: Path, by_tensorstore: list[np.ndarray]) -> None:
    store = write_store(tmp_path / "c.zarr", StoreShape(samples=6, layers=1, grid=(1, 1), dim=8))
    expected = store.read("train", [1, 3])[0]
    flip(tmp_path / "c.zarr/train/layer_00/c/0/0/0", 2 * (2 * 8 + 4))
    store = open_store(tmp_path / "c.zarr")
    np.testing.assert_array_equal(store.read("train", [1, 3])[0], expected)
    assert not by_tensorstore
    with pytest.raises(JobError, match="shard 0 of train"):
        store.read("train", [1, 2, 3])


def test_every_chunk_is_checked_once_before_its_first_use(store: Store, checked: list[int]) -> None:
    store.fetch("train", [3, 0]).result()
    assert checked.count(ROW_BYTES) == 2 * len(LAYERS)
    store.fetch("train", [0, 3, 0]).result()
    assert checked.count(ROW_BYTES) == 2 * len(LAYERS)
    store.fetch("train", [2, 3]).result()
    assert checked.count(ROW_BYTES) == 3 * len(LAYERS)


def test_a_file_that_was_touched_is_checked_again(store: Store, tmp_path: Path, checked: list[int]) -> None:
    store.fetch("train", [2, 3]).result()
    os.utime(tmp_path / "cache.zarr" / FILE)
    store.fetch("train", [2, 3]).result()  # by tensorstore
    checked.clear()
    assert_sound(store, [2, 3])
    assert checked.count(ROW_BYTES) == 2


def rewritten(file: Path) -> None:
    flip(file)


def with_its_old_time(file: Path) -> None:
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    flip(other)
    other.replace(file)


def cut_short(file: Path) -> None:
    os.truncate(file, 10)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def removed(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [rewritten, with_its_old_time, replaced, cut_short, emptied, removed])
def test_a_file_that_is_damaged_after_its_rows_were_used_is_an_error(
    store: Store, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "cache.zarr" / FILE
    content = file.read_bytes()
    assert_sound(store, [2, 3, 4])
    change(file)
    for _ in range(2):
        with pytest.raises(JobError, match=r"shard 1 of train: .*layer_02/c/1/0/0\""):
            store.read("train", [4, 2])
    assert_sound(store, [4, 0])
    file.write_bytes(content)
    assert_sound(store, [2, 3, 4])


def test_a_repaired_file_is_read_by_who_has_the_store_open(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "cache.zarr" / FILE
    content = file.read_bytes()
    flip(file)
    with pytest.raises(JobError, match="layer_02/c/1/0/0"):
        store.read("train", [2])
    assert_sound(store, [3])
    file.unlink()
    file.write_bytes(content)
    assert_sound(store, [2, 3])


def test_a_store_that_is_made_anew_in_its_place_is_read_from_its_own_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_tensorstore: list[np.ndarray]
) -> None:
    """The files of the deleted store may still be open."""
    assert_sound(store, [0, 3, 4])
    shutil.rmtree(tmp_path / "cache.zarr")
    values = small_store.values
    monkeypatch.setattr(small_store, "values", lambda split, layer: values(split, layer) + 1)
    assert_sound(small_store.complete(tmp_path / "cache.zarr", small_store.schema()), [0, 3, 4])
    assert not by_tensorstore


@pytest.mark.parametrize("place", [-1, -5, -20])  # of the index's checksum and of the index itself
def test_a_damaged_index_is_an_error_that_names_the_file(store: Store, tmp_path: Path, place: int) -> None:
    flip(tmp_path / "cache.zarr" / FILE, place)
    with pytest.raises(JobError, match="layer_02/c/1/0/0"):
        store.read("train", [2])


def test_rows_in_another_order_within_a_shard_are_read_all_the_same(
    store: Store, tmp_path: Path, by_tensorstore: list[np.ndarray]
) -> None:
    file = tmp_path / "cache.zarr" / FILE
    content = file.read_bytes()
    stride = ROW_BYTES + 4
    first, second = content[:stride], content[stride : 2 * stride]
    index = np.array([[stride, stride], [0, stride]], "<u8").tobytes()
    file.write_bytes(second + first + index + google_crc32c.value(index).to_bytes(4, "little"))
    assert_sound(store, [3, 2])
    assert by_tensorstore


def test_values_in_another_order_of_bytes_are_read_as_the_metadata_say(store: Store, tmp_path: Path) -> None:
    kvstore = small_store.kvstore_at(tmp_path / "cache.zarr")
    for number in LAYERS:
        node = kvstore.read_node(f"train/layer_{number:02d}")
        assert node is not None
        inner = node["codecs"][0]["configuration"]
        inner["codecs"] = [{"name": "bytes", "configuration": {"endian": "big"}}, CRC32C]
        kvstore.write_node(f"train/layer_{number:02d}", node)
    swapped = open_store(tmp_path / "cache.zarr").read("train", [1])[0]
    np.testing.assert_array_equal(swapped, expected("train", 0, "float32")[[1]].byteswap())


def test_more_shards_than_files_may_be_open(
    store: Store, monkeypatch: pytest.MonkeyPatch, by_tensorstore: list[np.ndarray]
) -> None:
    files = OpenFiles(limit=2)
    monkeypatch.setattr(layer_reader, "_open_files", lambda: files)
    gc.collect()
    before = psutil.Process().num_fds()
    for _ in range(3):
        assert_sound(store, [4, 0, 2, 1, 3])
    gc.collect()
    assert psutil.Process().num_fds() <= before + 2
    assert not by_tensorstore


def test_batches_that_are_kept_do_not_change_as_others_are_read(store: Store) -> None:
    draw = np.random.default_rng(0)
    groups = [draw.integers(0, SIZES["train"], 3) for _ in range(20)]
    pending = [store.fetch("train", rows) for rows in groups]
    kept = [reading.result() for reading in pending]
    for rows in groups:
        store.fetch("train", rows).result()
    for rows, found in zip(groups, kept, strict=True):
        for number, part in found.items():
            np.testing.assert_array_equal(part.values, expected("train", number, "float32")[rows])


def test_memory_is_lent_again_once_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers()
    lent = buffers.lend(64)
    address, view = lent.ctypes.data, lent[8:].view(np.float32).reshape(2, 7)
    del lent
    other = buffers.lend(64)
    assert other.ctypes.data != address
    del view
    assert buffers.lend(64).ctypes.data == address
    assert len(buffers.lend(4096)) == 4096


def test_rows_of_many_shards_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per thread, besides the few in the cache: their number is limited."""
    open_now, most = 0, 0

    class Counted(files.OpenFile):
        def __init__(self, path: str) -> None:
            nonlocal open_now, most
            super().__init__(path)
            open_now += 1
            most = max(most, open_now)

        def __del__(self) -> None:
            nonlocal open_now
            super().__del__()
            open_now -= 1

    monkeypatch.setattr(files, "OpenFile", Counted)
    kept = OpenFiles(3)
    monkeypatch.setattr(layer_reader, "_open_files", lambda: kept)
    store = write_store(tmp_path / "c.zarr", StoreShape(samples=80, layers=3, grid=(1, 1), dim=8, shard_samples=1))
    rows = np.random.default_rng(0).permutation(80)
    expected = store.fetch("train", slice(None)).result()
    for _ in range(2):
        for number, read in store.fetch("train", rows).result().items():
            np.testing.assert_array_equal(read.values, expected[number].values[rows])
    assert 3 <= most <= 3 + layer_reader._MAX_THREADS + 1
