"""A damaged, truncated or incomplete store raises JobError or UserError; it never returns other values or zeros."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
from small_store import SIZES

from store.arrays import open_schema
from store.errors import JobError, UserError
from store.reader import open_store

LOCATIONS = 5  # bytes flipped in each file: the first, the last, and some between


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "cache.zarr"
    small_store.complete(path, small_store.schema("int8"), skip=[1])
    return path


def everything(path: Path) -> dict[str, Any]:
    """Everything that can be read from a store."""
    store = open_store(path)
    found: dict[str, Any] = {"classes": store.classes, "tail": store.tail_arrays(), "rms": store.rms}
    for split in SIZES:
        found |= {
            f"{split}/tokens": store.read(split, slice(None)),
            f"{split}/labels": store.labels(split),
            f"{split}/ids": store.sample_ids(split),
            f"{split}/skipped": store.skipped(split),
        }
    return found


def refusal(path: Path) -> str | None:
    """The error when everything is read from a store; None if there is none."""
    try:
        everything(path)
    except (JobError, UserError) as error:
        return str(error)
    return None


def assert_same_or_refused(path: Path, truth: dict[str, Any], what: str) -> bool:
    """Whether the damage was refused."""
    message = refusal(path)
    if message is None:
        np.testing.assert_equal(everything(path), truth, err_msg=what)
        return False
    assert "\n" not in message, what
    assert str(path) in message, f"{what}: {message}"
    return True


def test_a_flipped_byte_is_never_read_as_another_value(pristine: Path) -> None:
    truth, refused = everything(pristine), set()
    files = [file for file in sorted(pristine.rglob("*")) if file.is_file()]
    for number, file in enumerate(files):
        content = file.read_bytes()
        draw = np.random.default_rng(number)
        for place in {0, len(content) - 1, *draw.integers(0, len(content), LOCATIONS - 2).tolist()}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(draw.integers(0, 8))
            file.write_bytes(damaged)
            if assert_same_or_refused(pristine, truth, f"{file} byte {place}"):
                refused.add(str(file.relative_to(pristine)))
        file.write_bytes(content)
    # Not read: the metadata of groups, and the digests of samples, which the provenance summarizes.
    unread = {"train/zarr.json", "test/zarr.json", "rms/zarr.json", "tail/zarr.json"}
    unread |= {f"{split}/sample_digest/{name}" for split in SIZES for name in ("zarr.json", "c/0/0")}
    # Nor the digests that only `verify` compares.
    unread |= {str(file.relative_to(pristine)) for file in files if "shard_digest" in file.parts}
    assert {str(file.relative_to(pristine)) for file in files} - refused == unread


def test_every_byte_of_the_root_is_checked(pristine: Path) -> None:
    kvstore, root = small_store.kvstore_at(pristine), pristine / "zarr.json"
    content, truth = root.read_bytes(), open_schema(kvstore)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        root.write_bytes(damaged)
        with contextlib.suppress(JobError, UserError):
            assert open_schema(kvstore) == truth, place
    root.write_bytes(content)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes(len(content)))


@pytest.mark.parametrize("how", ["deleted", "empty", "truncated", "zeroed"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "float32"])
def test_a_file_that_is_gone_or_cut_off_is_an_error_that_names_the_store(tmp_path: Path, dtype: str, how: str) -> None:
    path = tmp_path / "cache.zarr"
    small_store.complete(path, small_store.schema(dtype))
    truth = everything(path)
    for file in [file for file in sorted(path.rglob("*")) if file.is_file() and "_log" not in file.parts]:
        content = file.read_bytes()
        damage(file, how)
        assert_same_or_refused(path, truth, f"{file} {how}")
        file.write_bytes(content)


def test_a_committed_shard_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema())
    (tmp_path / "c.zarr/train/layer_02/c/1/0/0").unlink()
    assert store.read("train", [0, 1, 4])[2].any()
    with pytest.raises(JobError, match=r"c\.zarr/train/layer_02/c/1/0/0\" is missing; `sidecache verify` lists all"):
        store.read("train", [2])


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema())
    file = tmp_path / "c.zarr/train/layer_02/c/1/0/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"c\.zarr/train/layer_02/c/1/0/0\".*; `sidecache verify` lists all damage"):
        store.read("train", [2])
    assert store.read("train", [3])[2].any()


def test_a_shard_without_its_mark_is_not_there(tmp_path: Path) -> None:
    wanted = small_store.schema()
    writer = small_store.create(tmp_path / "c.zarr", wanted)
    small_store.commit(tmp_path / "c.zarr", writer, wanted, "train", 1, ())
    store = open_store(tmp_path / "c.zarr")
    assert store.missing_shards("train") == [0, 2]
    assert store.read("train", [2, 3])[0].any()
    with pytest.raises(JobError, match=r"shard 2 of train in .* is not extracted yet; run `sidecache extract`"):
        store.read("train", [2, 4])
    with pytest.raises(JobError, match="lacks 2 of 3 shards of train; finish it with `sidecache extract`"):
        store.require_complete()


def test_tokens_of_zeros_are_stored_and_read_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros: Callable[..., np.ndarray] = lambda split, layer: np.zeros((SIZES[split], 5, 4), np.float32)  # noqa: E731
    monkeypatch.setattr(small_store, "values", zeros)
    store = small_store.complete(tmp_path / "c.zarr", small_store.schema())
    assert not store.read("train", slice(None))[0].any()
    shutil.rmtree(tmp_path / "c.zarr/train/layer_00/c/0")
    with pytest.raises(JobError, match="is missing"):
        store.read("train", [0])
