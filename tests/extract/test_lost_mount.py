"""If a disk is unmounted or fills up during a job: one clear error, nothing in its place, and the command resumes."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_store import contents

from extract.backbones.backbone import TimmBackbone
from extract.config import DataConfig, ExtractConfig
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store.config import StoreConfig
from store.errors import JobError
from store.kvstore import KeyValueStore
from store.writer import StoreWriter


class Disk:
    """A disk that can be mounted at `place` and lost: a bind mount that keeps its content, or another mount."""

    def __init__(self, folder: Path) -> None:
        self.place, self._content = folder / "disk", folder / "content"
        self.place.mkdir()
        self._content.mkdir()

    def mount(self, *what: str) -> None:
        command = ["mount", *(what or ("--bind", str(self._content))), str(self.place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    def lose(self) -> None:
        """Unmount it lazily: open files stay usable, no other can be opened."""
        subprocess.run(["umount", "--lazy", self.place], check=True)

    def close(self) -> None:
        while subprocess.run(["umount", "--lazy", self.place], capture_output=True).returncode == 0:
            pass


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.close()


def extract(images: Path, store: Path, backbone: TimmBackbone) -> int:
    data = DataConfig(source="folder", root=images)
    stored = StoreConfig(path=str(store), dtype="int8", shard_samples=5)
    config = ExtractConfig(device="cpu")
    job = ExtractionJob(source=open_source(data), backbone=backbone, data=data, store=stored, extract=config)
    return extract_tokens(job).shards_written


def act_before(owner: type, name: str, k: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Act before the k-th call of a method, counted from 0."""
    call, calls = getattr(owner, name), iter(range(10**6))

    def acting(*given: Any, **named: Any) -> Any:
        if next(calls) == k:
            act()
        return call(*given, **named)

    patch.setattr(owner, name, acting)


@pytest.mark.parametrize(
    ("owner", "name", "k"),
    [
        (KeyValueStore, "write_bytes", 0),  # of the metadata
        (KeyValueStore, "write_bytes", 20),
        (KeyValueStore, "write_bytes", 50),
        (StoreWriter, "write", 0),
        (StoreWriter, "write", 3),
        (StoreWriter, "add_to_log", 3),
        (StoreWriter, "mark", 7),  # of the last shard
    ],
)
def test_a_disk_that_is_lost_ends_the_job_and_nothing_is_written_in_its_place(
    image_folder: Path, tmp_path: Path, disk: Disk, tiny_backbone: TimmBackbone, owner: type, name: str, k: int
) -> None:
    total = extract(image_folder, tmp_path / "whole.zarr", tiny_backbone)
    store = disk.place / "c.zarr"
    disk.mount()
    with pytest.MonkeyPatch.context() as patch:
        act_before(owner, name, k, disk.lose, patch)
        with pytest.raises(
            JobError, match=r"disk/c\.zarr/ is gone, or on another disk.* Mount it again, then"
        ) as error:
            extract(image_folder, store, tiny_backbone)
    assert "\n" not in str(error.value)
    assert list(disk.place.iterdir()) == []
    disk.mount()
    committed = len(list(store.glob("*/status/c/*")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.lock._is_alive", lambda owner: False)  # the job's process has ended by now
        assert extract(image_folder, store, tiny_backbone) == total - committed
    assert contents(store) == contents(tmp_path / "whole.zarr")


def test_a_store_that_is_the_disk_itself_is_not_begun_anew_below_it(
    image_folder: Path, disk: Disk, tiny_backbone: TimmBackbone
) -> None:
    """Without its disk the folder still exists, empty; only the device number differs."""
    disk.mount("-t", "tmpfs", "tmpfs")
    with pytest.MonkeyPatch.context() as patch:
        act_before(KeyValueStore, "write_bytes", 20, disk.lose, patch)
        with pytest.raises(JobError, match=r"disk/ is gone, or on another disk than before: was that unmounted\?"):
            extract(image_folder, disk.place, tiny_backbone)
    assert list(disk.place.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "name", "k"), [(KeyValueStore, "write_bytes", 20), (StoreWriter, "write", 3), (StoreWriter, "mark", 7)]
)
def test_a_disk_that_fills_up_costs_the_shard_in_flight(
    image_folder: Path, tmp_path: Path, disk: Disk, tiny_backbone: TimmBackbone, owner: type, name: str, k: int
) -> None:
    extract(image_folder, tmp_path / "whole.zarr", tiny_backbone)
    disk.mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    store, other = disk.place / "c.zarr", disk.place / "of somebody else"

    def fill() -> None:
        with suppress(OSError), other.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with pytest.MonkeyPatch.context() as patch:
        act_before(owner, name, k, fill, patch)
        with pytest.raises(JobError, match=r"No space left on device; make room, then run the same command") as error:
            extract(image_folder, store, tiny_backbone)
    assert "\n" not in str(error.value)
    other.unlink()
    extract(image_folder, store, tiny_backbone)
    assert contents(store) == contents(tmp_path / "whole.zarr")
