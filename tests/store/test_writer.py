"""The commit protocol: a crash or a full disk between any two writes loses nothing and leaves nothing half-written."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
from small_store import contents

from store import kvstore as backend
from store.arrays import STORED, read_log
from store.compare import require_same
from store.dtypes import Encoded
from store.errors import JobError, UserError
from store.reader import open_store
from store.schema import Provenance


class Crash(BaseException):
    """A simulated crash of the process."""


class CrashAt:
    """Replaces `store.kvstore._run`, through which all writes go; crashes instead of the k-th write."""

    def __init__(self, k: int) -> None:
        self.k, self.writes = k, 0
        self._run = backend._run

    def __call__(self, call: Callable[[], Any], doing: str) -> Any:
        if doing.startswith(("write", "commit")):
            self.writes += 1
            if self.writes == self.k:
                raise Crash
        return self._run(call, doing)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "cache.zarr"
    small_store.complete(path, small_store.schema("int8"), skip=[3])
    return contents(path)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A path in memory if there is /dev/shm: syncing hundreds of stores to a disk takes half a minute."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder) / "cache.zarr"


def test_a_crash_before_any_write_leaves_no_store_or_one_that_resumes(
    memory_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, path = small_store.schema("int8"), memory_path
    for k in range(1, 1000):
        crash = CrashAt(k)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_run", crash)
            with contextlib.suppress(Crash):
                small_store.complete(path, wanted, skip=[3])
        if crash.writes < k:
            break
        assert_nothing_half_written(path)
        store = small_store.complete(path, wanted, skip=[3])
        assert store.skipped("train") == {"train/ünïcode 3.png": "it is no image"}, k
        assert contents(path) == uninterrupted, k
        shutil.rmtree(path)
    assert k > 40  # every document, array, shard and mark is a write


def assert_nothing_half_written(path: Path) -> None:
    """Assert that there is no store, or that every committed row reads correctly."""
    try:
        store = open_store(path)
    except JobError as error:
        assert "there is no store at" in str(error)  # noqa: PT017
        return
    for split, n in small_store.SIZES.items():
        missing = [row for s in store.missing_shards(split) for row in store.schema.shards(split).rows(s)]
        rows = [row for row in range(n) if row not in missing and (split, row) != ("train", 3)]
        kept = [row for row in range(n) if row in missing or row in rows]
        if not missing:
            assert store.num_samples(split) == len(rows)
        numbers = [row if store.num_samples(split) == n else kept.index(row) for row in rows]
        for layer, values in store.read(split, numbers).items():
            np.testing.assert_array_equal(values, small_store.expected(split, layer, "int8")[rows])


def test_marks_of_a_store_that_is_gone_vouch_for_nothing(tmp_path: Path) -> None:
    small_store.complete(tmp_path, small_store.schema())
    (tmp_path / "zarr.json").unlink()
    with pytest.raises(JobError, match=r"train has shards of a store that is gone; delete that folder, or choose"):
        small_store.complete(tmp_path, small_store.schema())


def shard(**changes: Any) -> tuple[dict[int, Encoded], np.ndarray]:
    part: dict[str, Any] = {
        "shape": (2, 5, 4),
        "dtype": np.int8,
        "scale": (2, 5),
        "layers": (0, 2),
        "rows": 2,
    } | changes
    scale = None if part["scale"] is None else np.ones(part["scale"], np.float32)
    encoded = Encoded(np.zeros(part["shape"], part["dtype"]), scale)
    return dict.fromkeys(part["layers"], encoded), np.full(part["rows"], STORED, np.uint8)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (1, 5, 4), "scale": (1, 5)},  # tensorstore would broadcast it
        {"dtype": np.float32},
        {"scale": None},
        {"layers": (0,)},
        {"layers": (0, 1, 2)},
        {"rows": 1},
    ],
)
def test_a_shard_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    writer = small_store.create(tmp_path, small_store.schema("int8"))
    with pytest.raises(ValueError, match="this shard takes"):
        writer.commit("train", 0, *shard(**changes))
    assert writer.missing_shards("train") == [0, 1, 2]
    writer.commit("train", 0, *shard())
    assert writer.missing_shards("train") == [1, 2]


def test_a_second_commit_of_the_same_shard_changes_nothing(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    wanted = small_store.schema("int8")
    small_store.complete(tmp_path, wanted, skip=[3])
    small_store.commit(tmp_path, small_store.create(tmp_path, wanted), wanted, "train", 1, [3])
    assert contents(tmp_path) == uninterrupted


def test_the_log_adds_up(tmp_path: Path) -> None:
    writer = small_store.create(tmp_path, small_store.schema())
    writer.add_to_log({"extract_seconds": 1.5}, {"a": "broken"})
    writer.add_to_log({"extract_seconds": 2.0}, {"b": "gone"})
    assert read_log(small_store.kvstore_at(tmp_path)) == {
        "extract_seconds": 3.5,
        "skipped": {"a": "broken", "b": "gone"},
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system; call it with mount options to mount or change it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return place / "cache.zarr"

    yield mount
    while subprocess.run(["umount", "--lazy", place], capture_output=True).returncode == 0:
        pass


@pytest.mark.parametrize("n_blocks", [3, 20, 36, 44])  # the store takes about 50 blocks of 4 KiB
def test_a_full_disk_is_one_line_and_the_same_call_completes_it(
    small_disk: Callable[[str], Path], uninterrupted: dict[str, bytes], n_blocks: int
) -> None:
    path, wanted = small_disk(f"size={4 * n_blocks}k"), small_store.schema("int8")
    with pytest.raises(JobError, match=r"No space left on device; make room, then run the same command again") as full:
        small_store.complete(path, wanted, skip=[3])
    assert str(path) in str(full.value)
    assert "\n" not in str(full.value)
    assert_nothing_half_written(path)
    small_disk("size=4m,remount")
    small_store.complete(path, wanted, skip=[3])
    assert contents(path) == uninterrupted


def test_a_read_only_disk_is_one_line_and_still_readable(small_disk: Callable[[str], Path]) -> None:
    path, wanted = small_disk("size=4m"), small_store.schema()
    small_store.commit(path, small_store.create(path, wanted), wanted, "train", 0, ())
    small_disk("ro,remount")
    with pytest.raises(JobError, match=r"cache\.zarr/.*Read-only file system; choose another store\.path, or make"):
        small_store.complete(path, wanted)
    np.testing.assert_array_equal(
        open_store(path).read("train", [1])[2], small_store.expected("train", 2, "float32")[[1]]
    )


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match=r"file/cache\.zarr.*Not a directory; choose another store\.path") as refused:
        small_store.complete(tmp_path / "file/cache.zarr", small_store.schema())
    assert "\n" not in str(refused.value)


CHANGED: dict[str, Any] = {
    "backbone": "vit_large",
    "model_kwargs": {"depth": 4},
    "weights_digest": "ffff",
    "image_size": (3, 64, 64),
    "preprocessing": "bilinear, 32 px",
    "preprocessing_digest": "ffff",
    "tokens": "cls",
    "dtype": "float16",
    "precision": "bfloat16",
    "extraction_version": 2,
    "sampling": '{"frames": 8}',
    "drawn": '{"test_fraction": 0.3, "split_seed": 0}',
    "decoder_digest": "0123",
    "augmentation": '{"views": 4}',
}


def test_every_field_of_the_provenance_is_tested() -> None:
    assert set(CHANGED) | {"samples"} == set(Provenance.model_fields)  # more of those may come: test_growing.py


@pytest.mark.parametrize("field", CHANGED)
def test_a_store_made_from_something_else_is_refused_by_the_field_that_differs(field: str) -> None:
    stored = small_store.schema()
    wanted = small_store.schema(provenance=small_store.provenance(**{field: CHANGED[field]}))
    with pytest.raises(UserError) as refused:
        require_same(stored, wanted, "/data/cache.zarr/")
    lines = str(refused.value).splitlines()
    assert lines[0] == "the store /data/cache.zarr/ was made from something else:"
    before, after = (schema.provenance.model_dump(mode="json").get(field, "") for schema in (stored, wanted))
    assert lines[1:-1] == [f"  provenance.{field}: stored {before!r}, wanted {after!r}"]
    assert "Undo that change, or choose another store.path" in lines[-1]


def test_all_differences_are_named_at_once() -> None:
    wanted = small_store.schema(multi_label=True, provenance=small_store.provenance(dtype="int8", backbone="b"))
    with pytest.raises(UserError, match=r"(?s)provenance\.backbone.*provenance\.dtype.*multi_label: stored False"):
        require_same(small_store.schema(), wanted, "x")


def test_tuples_of_the_caller_equal_the_lists_that_were_stored(tmp_path: Path) -> None:
    wanted = small_store.schema(provenance=small_store.provenance(model_kwargs={"img_size": (32, 32)}))
    stored = small_store.complete(tmp_path, wanted).schema
    require_same(stored, wanted, "x")


def test_what_decides_no_value_may_differ() -> None:
    require_same(small_store.schema(), small_store.schema(compressor="zstd", shard_samples=7), "x")
