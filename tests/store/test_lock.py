"""One job at a time on a store, with real processes that are killed, frozen and continued."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_store
import zarr
from small_store import contents, kvstore_at

from store import lock as lock_module
from store.errors import JobError
from store.kvstore import LOCK, KeyValueStore
from store.lock import Lock, Watch, hold, read_owner
from store.verify import verify_store
from store.writer import StoreWriter

ROOT = Path(__file__).parents[2]
BEAT, PATIENCE = 0.1, 1.0
KEY = f"{LOCK}/zarr.json"
JOB = f"""
import sys
from store.address import store_url
from store.kvstore import KeyValueStore
from store.errors import JobError
from store.lock import hold

with hold(KeyValueStore(store_url(sys.argv[1])), {BEAT}, {PATIENCE}) as lock:
    print("held", flush=True)
    for _ in sys.stdin:
        try:
            lock.check()
            print("held", flush=True)
        except JobError as error:
            print(error, flush=True)
"""


class Job:
    """A process that holds the lock until its standard input ends."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", JOB, str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.answer() == "held"

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def check(self) -> str:
        """The result of the job's check of its lock."""
        assert self.process.stdin
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.zarr"


@pytest.fixture
def start(path: Path) -> Iterator[Callable[[], Job]]:
    """Start jobs on one store; all are killed after the test."""
    jobs: list[Job] = []

    def begin() -> Job:
        jobs.append(Job(path))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.process.kill()
        job.process.communicate()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError("it waits for a heartbeat")

    monkeypatch.setattr(lock_module.time, "sleep", refuse)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process believe that it is on another machine."""
    monkeypatch.setattr(lock_module, "_machine", lambda: "elsewhere")


def new_lock(kvstore: KeyValueStore) -> Lock:
    return Lock(kvstore, BEAT, PATIENCE)


def test_a_second_job_is_refused_at_once_by_the_name_of_the_first(
    path: Path, start: Callable[[], Job], no_waiting: None
) -> None:
    job, host = start(), lock_module.socket.gethostname()
    named = (
        rf"cache\.zarr/ is in use by `-c .*cache\.zarr` \(process {job.process.pid} on {host}, since 20\S+\+00:00\);"
    )
    with pytest.raises(JobError, match=named + " wait until that job ends, or stop it, then run this one again"):
        new_lock(kvstore_at(path)).acquire()
    assert job.check() == "held"


def test_the_lock_is_free_after_the_job_and_nothing_is_left_of_it(path: Path, start: Callable[[], Job]) -> None:
    assert start().end() == 0
    assert not path.exists()
    wanted = small_store.schema()
    small_store.complete(path, wanted)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(KeyboardInterrupt), hold(kvstore_at(path)):  # noqa: PT012
        assert (path / KEY).exists()
        raise KeyboardInterrupt
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [file.name for file in (path / "_log").iterdir()] == ["zarr.json"]


def test_a_killed_job_holds_nothing(path: Path, start: Callable[[], Job], no_waiting: None) -> None:
    job = start()
    job.process.kill()  # it stays a zombie, since it is not waited for
    while psutil.Process(job.process.pid).status() != psutil.STATUS_ZOMBIE:
        threading.Event().wait(0.01)
    assert (path / KEY).exists()
    new_lock(kvstore_at(path)).acquire()


def test_a_job_that_is_gone_holds_nothing(path: Path, start: Callable[[], Job], no_waiting: None) -> None:
    job = start()
    job.process.kill()
    job.process.wait()
    start()
    with pytest.raises(JobError, match="is in use by"):
        new_lock(kvstore_at(path)).acquire()


def test_a_frozen_job_of_this_machine_holds_its_lock(path: Path, start: Callable[[], Job], no_waiting: None) -> None:
    job = start()
    job.process.send_signal(signal.SIGSTOP)
    with pytest.raises(JobError, match=rf"is in use by .*process {job.process.pid} on "):
        new_lock(kvstore_at(path)).acquire()
    job.process.send_signal(signal.SIGCONT)
    assert job.check() == "held"


def test_from_elsewhere_a_heartbeat_refuses(path: Path, start: Callable[[], Job], elsewhere: None) -> None:
    job = start()
    with pytest.raises(JobError, match=rf"is in use by .*process {job.process.pid} on "):
        new_lock(kvstore_at(path)).acquire()
    assert job.check() == "held"


def test_a_worker_goes_on_while_its_own_job_holds_the_lock(path: Path) -> None:
    with hold(kvstore_at(path)) as lock:
        Watch(kvstore_at(path), lock.id).check()
        with pytest.raises(JobError, match=r"has lost .* to `.*; it writes nothing"):
            Watch(kvstore_at(path), "another job").check()
    with pytest.raises(JobError, match=r"has lost .* to nobody; it writes nothing"):
        Watch(kvstore_at(path), lock.id).check()


def test_a_job_that_has_released_its_lock_does_not_take_it_again(path: Path) -> None:
    lock = new_lock(kvstore_at(path))
    lock.acquire()
    lock.release()
    with pytest.raises(JobError, match=r"this job has released .* it writes nothing more"):
        lock.check()
    assert read_owner(kvstore_at(path)) is None


def test_a_job_frozen_for_too_long_loses_its_lock_and_is_told_so(
    path: Path, start: Callable[[], Job], elsewhere: None
) -> None:
    job = start()
    job.process.send_signal(signal.SIGSTOP)
    with hold(kvstore_at(path), BEAT, PATIENCE) as lock:
        job.process.send_signal(signal.SIGCONT)
        answer = job.check()
        assert f"this job lost {path}/ to `" in answer
        assert f"(process {os.getpid()} on " in answer
        assert answer.endswith("it stops before it writes anything more; what is committed is kept")
        assert job.end() == 0  # it does not delete the other job's lock
        lock.check()


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_writer_that_lost_its_lock_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    wanted = small_store.schema()
    url = tmp_path / "c.zarr" if place == "local" else f"memory://{tmp_path.name}/c.zarr"
    small_store.create(url, wanted)
    first, second = new_lock(kvstore_at(url)), new_lock(kvstore_at(url))
    first.acquire()
    old = StoreWriter(kvstore_at(url), wanted, first)
    small_store.commit(url, old, wanted, "train", 0, ())
    second._owner["machine"] = "elsewhere"
    second.acquire()
    new = StoreWriter(kvstore_at(url), wanted, second)
    for attempt in (
        lambda: small_store.commit(url, old, wanted, "train", 1, ()),
        lambda: old.add_to_log({"extract_seconds": 1.0}, {}),
        lambda: old.unmark("train", [0]),
    ):
        with pytest.raises(JobError, match=r"this job lost .* because it was frozen for too long"):
            attempt()
    assert new.missing_shards("train") == [1, 2]
    small_store.commit(url, new, wanted, "train", 1, ())
    first.release()
    small_store.commit(url, new, wanted, "train", 2, ())
    assert new.missing_shards("train") == []


def test_a_writer_that_loses_its_lock_between_data_and_mark_marks_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = small_store.schema()
    small_store.create(path, wanted)
    lock = new_lock(kvstore_at(path))
    lock.acquire()
    writer = StoreWriter(kvstore_at(path), wanted, lock)
    checks = iter([None, None, JobError("lost")])

    def check() -> None:
        if error := next(checks):
            raise error

    monkeypatch.setattr(lock, "check", check)
    with pytest.raises(JobError, match="lost"):
        small_store.commit(path, writer, wanted, "train", 0, ())
    assert (path / "train/layer_00/c/0/0/0").exists()
    assert writer.missing_shards("train") == [0, 1, 2]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_of_many_that_reach_for_it_one_gets_it(tmp_path: Path, place: str) -> None:
    kvstore = kvstore_at(tmp_path / "c.zarr" if place == "local" else f"memory://{tmp_path.name}/c.zarr")
    ready, got, refused = threading.Barrier(8), [], []

    def reach() -> None:
        lock = new_lock(kvstore)
        ready.wait()
        try:
            lock.acquire()
            got.append(lock)
        except JobError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    assert all("is in use by" in text for text in refused)


def write_owner(kvstore: KeyValueStore, **changes: Any) -> None:
    kvstore.write_group(LOCK, lock_module.this_process() | {"beats": 3} | changes)


def test_a_process_number_that_is_anothers_by_now_holds_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_owner(kvstore_at(path), process_started=time.time() - 10**6)
    waits: list[float] = []
    monkeypatch.setattr(lock_module.time, "sleep", waits.append)
    Lock(kvstore_at(path), 0.001, 0.01).acquire()
    assert waits  # that process may be the owner: only its heartbeat shows it


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"attributes": 3}', b'{"attributes": {"machine": 1}}', b"\xff"]
)
def test_a_lock_that_cannot_be_read_is_taken_over_where_nobody_renews_it(path: Path, content: bytes) -> None:
    kvstore = kvstore_at(path)
    kvstore.write_bytes(KEY, content)
    Lock(kvstore, 0.001, 0.01).acquire()
    assert f"(process {os.getpid()} on " in str(read_owner(kvstore))


def test_owners_with_fields_of_another_kind_are_no_crash(path: Path) -> None:
    for process in (None, "x", -1, 10**30, [1]):
        write_owner(kvstore_at(path), process=process)
        Lock(kvstore_at(path), 0.001, 0.01).acquire()


def test_a_renewal_whose_answer_was_lost_loses_nothing(path: Path) -> None:
    lock = new_lock(kvstore_at(path))
    lock.acquire()
    lock._generation = b"\0older"
    lock.check()
    lock.check()


def test_a_lock_that_somebody_deleted_is_lost(path: Path) -> None:
    lock = new_lock(kvstore_at(path))
    lock.acquire()
    (path / KEY).unlink()
    with pytest.raises(JobError, match=r"this job lost .*cache\.zarr/ to another job"):
        lock.check()


def test_zarr_and_verify_are_not_disturbed(path: Path) -> None:
    small_store.complete(path, small_store.schema())
    before = contents(path)
    with hold(kvstore_at(path)), warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(zarr.open_group(path, mode="r").members(max_depth=None))
        assert members[LOCK].attrs["process"] == os.getpid()
        report = verify_store(path)
        assert contents(path) == before
    assert report.ok
    assert [note.partition(" holds ")[2][:9] for note in report.notes] == ["the store"]
    assert verify_store(path).notes == []


def test_clearing_a_store_keeps_its_lock(path: Path) -> None:
    for place in (path, f"memory://{path.parent.name}/clear.zarr"):
        small_store.complete(place, small_store.schema())
        kvstore = kvstore_at(place)
        with hold(kvstore) as lock:
            kvstore.clear()
            assert kvstore.keys() == [KEY]
            lock.check()
        assert kvstore.keys() == []


def test_the_lock_names_its_owner_to_any_reader(path: Path) -> None:
    with hold(kvstore_at(path)):
        owner = json.loads((path / KEY).read_text())["attributes"]
    assert {"host", "process", "since", "command", "beats"} < set(owner)


def test_a_disk_that_refuses_the_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(JobError, match=r"file/cache\.zarr.*choose another store\.path"),
        hold(kvstore_at(tmp_path / "file/cache.zarr")),
    ):
        pass
