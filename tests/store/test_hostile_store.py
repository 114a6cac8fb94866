"""A hostile store, with links, FIFOs and sockets at every place below its root: no command follows any of them."""

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import kvstore_at
from store_jobs import FORMATS, Jobs, renew, state

from extract.backbones.backbone import TimmBackbone
from store.errors import JobError
from store.io_errors import AccessError
from store.local.regular_files import require_regular
from store.lock import hold
from store.reader import open_store
from store.verify import verify_store

SECONDS = 120
ADDED_BY_JOBS = ("_log/next", "_log/next/zarr.json", "_log/added", "_log/added/zarr.json", "_log/lock")
LEFT_BY_JOBS = (
    "_log/lock/zarr.json",
    "_log/lock/zarr.json.__lock",
    "_log/next/zarr.json.__lock",
    "_log/zarr.json.__lock",
    "zarr.json.__lock",
    "train/status/c/0.__lock",
    "train/label/c/0.__lock",
    "train/shard_digest/c/0/0.__lock",
    "train/layer_02/zarr.json.__lock",
    "train/layer_02/c/0/0/0.4f.__lock",
    "of/nothing",
)


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """Raise an error instead of blocking forever."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)  # set again at every place
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", params=FORMATS)
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_backbone: TimmBackbone) -> Jobs:
    """Jobs with a whole store, of which each test makes a copy."""
    jobs = Jobs(tmp_path_factory.mktemp(request.param), tiny_backbone, request.param)
    jobs.make(jobs.folder / "whole.zarr")
    return jobs


@pytest.fixture
def fresh(jobs: Jobs) -> Jobs:
    """A copy of the store, and a victim next to it."""
    renew(jobs)
    return jobs


def places(store: Path) -> list[str]:
    """Every file and folder of a store, and those that jobs create temporarily or leave behind."""
    found = [str(path.relative_to(store)) for path in sorted(store.rglob("*"))]
    return [*found, *(name for name in (*ADDED_BY_JOBS, *LEFT_BY_JOBS) if name not in found)]


def link_to_its_own(place: Path, aside: Path, victim: Path) -> None:
    """The link leads to the same content, outside."""
    place.symlink_to(aside if aside.exists() else victim / "folder")


def link_to_folder(place: Path, aside: Path, victim: Path) -> None:
    place.symlink_to(victim / "folder")


def link_to_file(place: Path, aside: Path, victim: Path) -> None:
    place.symlink_to(os.path.relpath(victim / "file", place.parent))


def link_to_nothing(place: Path, aside: Path, victim: Path) -> None:
    """Opening the link would create its target."""
    place.symlink_to(victim / "new")


def fifo(place: Path, aside: Path, victim: Path) -> None:
    os.mkfifo(place)


def unix_socket(place: Path, aside: Path, victim: Path) -> None:
    with contextlib.chdir(place.parent), socket.socket(socket.AF_UNIX) as made:  # paths of sockets must be short
        made.bind(place.name)


PLANTS = {
    link_to_its_own: "is a symbolic link to '/",
    link_to_folder: "is a symbolic link to '/",
    link_to_file: r"is a symbolic link to '\.\.",
    link_to_nothing: "is a symbolic link to '/",
    fifo: "is a FIFO",
    unix_socket: "is a socket",
}


Plant = Callable[[Path, Path, Path], None]


@contextlib.contextmanager
def planted(jobs: Jobs, name: str, plant: Plant) -> Iterator[Path]:
    """Plant something at a place of the store for the block; the victim has the original meanwhile."""
    place, victim = jobs.store / name, jobs.folder / "victim"
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = victim / "of the store" / place.name
    if held := place.exists():
        place.rename(aside)
    plant(place, aside, victim)
    signal.alarm(SECONDS)
    yield place
    place.unlink()
    if held:
        aside.rename(place)
    for parent in missing:
        parent.rmdir()


def assert_refused_by_all(jobs: Jobs, name: str, plant: Plant) -> None:
    """Assert that every job refuses, and changes nothing."""
    with planted(jobs, name, plant) as place:
        before = state(jobs.folder / "victim"), state(jobs.store)
        for job, run in jobs.all.items():
            with pytest.raises(JobError, match=PLANTS[plant]) as error:
                run()
            assert f"{place} is " in str(error.value), job
            assert "remove it, then run the same command again" in str(error.value)
        assert (state(jobs.folder / "victim"), state(jobs.store)) == before, name


def by_name(plant: Plant) -> str:
    return plant.__name__


@pytest.mark.parametrize("jobs", ["plain"], indirect=True)
def test_no_job_follows_or_opens_what_is_neither_folder_nor_file(fresh: Jobs) -> None:
    """At every place of a store, by every command; the kinds take turns."""
    for number, name in enumerate(places(fresh.store)):
        if not name.startswith(("test", "train/layer_00", "train/scale_00")) and "/c/1" not in name:  # like the others
            assert_refused_by_all(fresh, name, list(PLANTS)[number % len(PLANTS)])


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=by_name)
def test_no_job_follows_or_opens_it_whatever_kind_it_is_of(fresh: Jobs, plant: Plant) -> None:
    for name in places(fresh.store):
        assert_refused_by_all(fresh, name, plant)


@pytest.mark.parametrize("plant", PLANTS, ids=by_name)
def test_every_place_is_looked_at_before_the_lock_is_taken(fresh: Jobs, plant: Plant) -> None:
    kvstore = kvstore_at(fresh.store)
    for name in places(fresh.store):
        refused = pytest.raises(JobError, match=PLANTS[plant])
        with planted(fresh, name, plant) as place, refused as error, hold(kvstore):
            pytest.fail("the lock was taken")
        assert f"{place} is " in str(error.value)
    assert not (fresh.store / "_log/lock").exists()


READ = (
    "test",
    "test/status",
    "test/status/c",
    "test/status/c/0",
    "test/label/c/0",
    "test/label/zarr.json",
    "zarr.json",
)


def files_read(store: Path) -> list[str]:
    """The places that `read` opens: all of the layers of a split, and some others."""
    return [*READ, *(place for place in places(store) if place.startswith(("test/layer", "test/scale")))]


def read(store: Path) -> dict[str, Any]:
    opened = open_store(store)
    return {"labels": opened.labels("test"), **{str(k): v for k, v in opened.read("test", [1, 0]).items()}}


@pytest.mark.parametrize("plant", PLANTS, ids=by_name)
def test_a_reader_opens_nothing_but_files(fresh: Jobs, plant: Plant) -> None:
    """It lists no folders except those of the marks."""
    for name in files_read(fresh.store):
        with planted(fresh, name, plant) as place, pytest.raises(JobError, match=PLANTS[plant]) as error:
            read(fresh.store)
        assert f"{place} is " in str(error.value)


@pytest.mark.parametrize("jobs", ["plain"], indirect=True)
@pytest.mark.parametrize("plant", PLANTS, ids=by_name)
def test_a_file_that_is_exchanged_under_a_reader_is_refused_or_reads_as_before(fresh: Jobs, plant: Plant) -> None:
    """Except in compressed stores, whose files are checked before tensorstore first opens them."""
    truth = open_store(fresh.store).read("test", [1, 0])
    for name in files_read(fresh.store):
        store = open_store(fresh.store)
        store.read("test", [0])
        with planted(fresh, name, plant), contextlib.suppress(JobError):
            np.testing.assert_equal(store.read("test", [1, 0]), truth)


def test_files_with_a_second_name_are_replaced_and_not_written_into(fresh: Jobs) -> None:
    """As in a backup with hard links to unchanged files."""
    backup = fresh.folder / "victim/backup"
    shutil.copytree(fresh.store, backup, copy_function=os.link)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in backup.rglob("*") if path.is_file()}
    for job in fresh.all.values():
        job()
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in backup.rglob("*") if path.is_file()}
    assert after == before
    assert {path.stat().st_nlink for path in before} == {1, 2}  # those that were replaced, and the others
    assert verify_store(fresh.store).complete


@pytest.mark.parametrize("key", ["zarr.json", "_log/zarr.json", "_log/lock/zarr.json", "train/status/c/1"])
def test_what_a_killed_write_left_is_refused_where_it_has_a_second_name(fresh: Jobs, key: str) -> None:
    """Since tensorstore would write into it, and so into the other file."""
    left = fresh.store / f"{key}.__lock"
    left.parent.mkdir(exist_ok=True)
    left.hardlink_to(fresh.folder / "victim/file")
    before = state(fresh.folder / "victim")
    for job in fresh.all.values():
        with pytest.raises(JobError, match=rf"{left} is left from a write that was killed, and has a second name"):
            job()
        assert state(fresh.folder / "victim") == before
    left.unlink()
    left.write_bytes(b"half")
    fresh.repair()
    assert verify_store(fresh.store).complete


def test_a_store_may_be_reached_through_a_link(fresh: Jobs) -> None:
    """`cache.zarr -> /big/disk/cache.zarr`, which the user has chosen."""
    fresh.store.rename(fresh.folder / "victim/elsewhere.zarr")
    fresh.store.symlink_to(fresh.folder / "victim/elsewhere.zarr")
    for job in fresh.all.values():
        job()
    assert fresh.store.is_symlink()
    assert verify_store(fresh.store).document() | {"store": ""} == verify_store(
        fresh.folder / "victim/elsewhere.zarr"
    ).document() | {"store": ""}
    assert verify_store(fresh.store).complete


def test_verify_goes_on_where_it_met_a_link(fresh: Jobs) -> None:
    """It lists all of them, and all other damage."""
    (fresh.store / "test/layer_02/c/0/0/0").write_bytes(b"")
    links = planted(fresh, "train/layer_00/c/0", link_to_its_own), planted(fresh, "tail/norm.weight/zarr.json", fifo)
    with links[0], links[1]:
        report = verify_store(fresh.store)
    assert len(report.faults) == 2
    assert [(damage.split, damage.layer) for damage in report.damaged] == [("train", 0), ("test", 2)]
    assert report.damaged[0].reason.startswith("is a symbolic link to")
    assert report.complete
    assert report.notes == []


def test_a_device_is_refused() -> None:
    with pytest.raises(AccessError, match="/dev/null is a device; below its root"):
        require_regular("/dev", "null")


@pytest.mark.parametrize("key", ["../victim/file", "train/../../victim/file", "train//c", "", "."])
def test_no_key_leads_out_of_a_store(fresh: Jobs, key: str) -> None:
    kvstore = kvstore_at(fresh.store)
    actions: list[Callable[[], Any]] = [
        lambda: kvstore.read_bytes(key),
        lambda: kvstore.write_bytes(key, b"new"),
        lambda: kvstore.write_if(key, None, b""),
        lambda: kvstore.write_files([(key, [memoryview(b"new")])], "write"),
        lambda: kvstore.has_keys(key),
        lambda: kvstore.remove(f"{key}/."),
    ]
    before = state(fresh.folder / "victim")
    for action in actions:
        with pytest.raises(JobError, match="is not a path within the store"):
            action()
    assert state(fresh.folder / "victim") == before
