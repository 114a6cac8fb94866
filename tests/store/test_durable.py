"""Files are written whole, many at once; shards written this way are what tensorstore would write."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import pytest
import small_store
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import contents

from store import writer
from store.config import Dtype
from store.local import durable_files as durable
from store.local.durable_files import remove_leftovers, replacing, write_files
from store.local.plain_shard import CRC_BYTES, PlainShard


def files(folder: Path, content: bytes = b"new") -> Iterator[tuple[Path, list[memoryview]]]:
    """Three files in folders that do not exist yet, in two pieces each."""
    for number in range(3):
        yield folder / f"{number}/c/0", [memoryview(content), memoryview(b"%d" % number)]


def test_files_are_written_in_place_of_old_ones(tmp_path: Path) -> None:
    for content in (b"old, and longer", b"new"):
        write_files(files(tmp_path, content))
        assert contents(tmp_path) == {f"{n}/c/0": content + b"%d" % n for n in range(3)}


def test_a_file_has_the_mode_that_any_new_file_has(tmp_path: Path) -> None:
    write_files(files(tmp_path))
    (tmp_path / "plain").touch()
    assert (tmp_path / "0/c/0").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "writev", "open"])
@pytest.mark.parametrize("number", range(3))
def test_a_disk_that_refuses_leaves_every_file_old_or_new_and_nothing_else(
    tmp_path: Path, call: str, number: int
) -> None:
    write_files(files(tmp_path, b"old"))
    before, calls, real = contents(tmp_path), 0, getattr(os, call)

    def refuse(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    with mock.patch.object(durable.os, call, refuse), pytest.raises(OSError, match="No space left"):
        write_files(files(tmp_path))
    after = contents(tmp_path)
    assert set(after) == set(before)
    assert all(content in (before[name], b"new" + before[name][-1:]) for name, content in after.items())


@pytest.mark.parametrize("most", [1, 7, 10**6])
def test_a_file_of_many_pieces_is_whole_however_little_a_disk_takes_at_once(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [b"%d" % number * (number % 4) for number in range(3000)]  # some are empty

    def writev(file: int, buffers: list[memoryview]) -> int:
        assert len(buffers) <= os.sysconf("SC_IOV_MAX")
        return os.write(file, b"".join(buffers)[:most])

    monkeypatch.setattr(durable.os, "writev", writev)
    write_files([(tmp_path / "whole", [memoryview(piece) for piece in pieces])])
    assert (tmp_path / "whole").read_bytes() == b"".join(pieces)


def test_what_killed_writers_left_can_be_removed(tmp_path: Path) -> None:
    write_files(files(tmp_path))
    for left in ("0.__lock", "0.abc.__lock"):
        (tmp_path / "1/c" / left).write_bytes(b"half")
    remove_leftovers(tmp_path / "1/c/0")
    remove_leftovers(tmp_path / "4/c/0")  # in a missing folder
    assert set(contents(tmp_path)) == {f"{n}/c/0" for n in range(3)}


def test_two_writers_of_the_same_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    def overtaken() -> Iterator[tuple[Path, list[memoryview]]]:
        yield from files(tmp_path, b"mine")
        write_files(files(tmp_path, b"theirs"))

    write_files(overtaken())
    assert contents(tmp_path) == {f"{n}/c/0": b"mine%d" % n for n in range(3)}


def test_a_file_that_a_library_writes_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, fsync = tmp_path / "whole", list[str](), os.fsync

    def watched(file: int) -> None:
        synced.append(f"{Path(f'/proc/self/fd/{file}').readlink()} {path.exists()}")
        fsync(file)

    monkeypatch.setattr(durable.os, "fsync", watched)
    with replacing(path) as written:
        written.write_bytes(b"new")
    assert synced == [f"{written} False", f"{tmp_path} True"]
    assert contents(tmp_path) == {"whole": b"new"}
    with suppress(KeyboardInterrupt), replacing(path) as written:
        written.write_bytes(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"whole": b"new"}


def test_two_libraries_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with replacing(path) as first, replacing(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert contents(tmp_path) == {path.name: b"first"}, "the one that ends last"


def test_a_name_with_signs_of_a_pattern_has_its_leftovers_removed_alone(tmp_path: Path) -> None:
    for name in ("a[1]", "a1"):
        (tmp_path / f"{name}.0.__lock").write_bytes(b"half")
    remove_leftovers(tmp_path / "a[1]")
    assert set(contents(tmp_path)) == {"a1.0.__lock"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_a_store_is_byte_for_byte_what_tensorstore_writes(
    tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = small_store.schema(dtype)
    small_store.complete(tmp_path / "ours", wanted, skip=[3])  # zeros; and the last shard of train is part-filled
    monkeypatch.setattr(writer, "holds_plain_rows", lambda *_: False)
    small_store.complete(tmp_path / "theirs", wanted, skip=[3])
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 8), st.lists(st.integers(1, 5), max_size=2), st.sampled_from("bhfd"))
def test_a_packed_shard_says_where_every_row_lies(samples: int, lacking: int, shape: list[int], kind: str) -> None:
    rows = max(1, samples - lacking)
    values = np.random.default_rng(rows).integers(-99, 99, (rows, *shape)).astype(kind)
    layout = PlainShard(samples, values[0].nbytes)
    file = b"".join(layout.pieces(values))
    assert len(file) == rows * layout.stride + layout.index_bytes + CRC_BYTES
    index, end = np.frombuffer(file[-layout.index_bytes - CRC_BYTES : -CRC_BYTES], "<u8").reshape(-1, 2), len(file)
    assert google_crc32c.value(index.tobytes()) == int.from_bytes(file[end - CRC_BYTES :], "little")
    assert (index[rows:] == 2**64 - 1).all()
    for row, (start, length) in zip(values, index[:rows].tolist(), strict=True):
        stored = bytes(file[start : start + length - CRC_BYTES])
        assert stored == row.tobytes()
        assert google_crc32c.value(stored) == int.from_bytes(
            file[start + length - CRC_BYTES : start + length], "little"
        )
