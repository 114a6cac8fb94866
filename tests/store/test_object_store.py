"""Stores in an object store have the same bytes as on a disk, also if the network fails in between."""

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from s3_server import BUCKET, FAULTS, Fault, Request, Server, now_and_then, serve
from small_store import LAYERS, SIZES, commit, complete, contents, create, expected, kvstore_at, schema, values

import sidecache as sc
from adapt.config.pipeline import Config
from store import address
from store import kvstore as backend
from store.arrays import require_store
from store.errors import JobError, UserError
from store.io_errors import OutageError
from store.lock import Lock, hold
from store.reader import open_store
from store.verify import verify_store
from store.verify_report import damaged_shards
from store.writer import StoreWriter

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
URL = f"s3://{BUCKET}/some/cache.zarr"
PREFIX = "some/cache.zarr"
QUICK = {"max_retries": 6, "initial_delay": "5ms", "max_delay": "20ms"}
LOCK_KEY = f"{PREFIX}/{backend.LOCK}/zarr.json"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 server that is named in the environment; failed requests are tried again at once."""
    with serve() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        quick_retries(monkeypatch)
        yield running


def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_RETRIES", QUICK)
    context = address.new_context()
    monkeypatch.setattr(backend, "_context", lambda: context)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("faults", [(), ("error", "drop"), ("error after", "drop after"), ("slow", "cut")], ids=str)
def test_a_job_stores_the_same_bytes_as_on_a_disk(
    server: Server, tiny_config: MakeConfig, tmp_path: Path, dtype: str, faults: tuple[Fault, ...]
) -> None:
    job = [f"store.dtype={dtype}", "backbone.weights=random"]
    sc.extract(tiny_config(*job))
    server.spoil = now_and_then(1, faults) if faults else server.spoil
    made = sc.extract(tiny_config(*job, f"store.path={URL}"))
    server.spoil = lambda _: None
    assert made.shards_written == 8
    assert bool(server.n_faults) == bool(faults)
    assert server.contents(PREFIX) == contents(tmp_path / "cache.zarr")
    assert sc.extract(tiny_config(*job, f"store.path={URL}")).shards_written == 0


@pytest.mark.parametrize("feature_source", ["resident", "streamed"])
def test_training_from_it_gives_what_training_from_a_disk_gives(
    server: Server, tiny_config: MakeConfig, tmp_path: Path, feature_source: str
) -> None:
    job = [f"train.feature_source={feature_source}", "methods=[{name: losa, rank: 4, token_rank: 2}]"]
    (local,) = sc.run(tiny_config(*job))
    server.spoil = now_and_then(2)
    (remote,) = sc.run(tiny_config(*job, f"store.path={URL}", f"run_dir={tmp_path / 'remote'}"))
    assert server.n_faults
    assert remote.top1 == local.top1
    near, far = (next((tmp_path / run / "adaptors").glob("*.safetensors")) for run in ("run", "remote"))
    assert far.read_bytes() == near.read_bytes()


JOB = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/helpers")!r}]
from small_store import complete, schema, kvstore_at
from store.lock import hold
with hold(kvstore_at(sys.argv[1]), 0.05, 60):
    complete(sys.argv[1], schema("int8"))
"""


@pytest.mark.parametrize("number", [1, 2, 20, 40, 50, 60, 70])
def test_a_job_killed_at_any_request_resumes(server: Server, tmp_path: Path, number: int) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, URL], stderr=subprocess.PIPE)

    def kill(_: Request) -> None:
        if server.count("PUT") == number:
            job.send_signal(signal.SIGKILL)

    server.refuse = kill
    assert job.wait(60) == -signal.SIGKILL
    assert job.stderr
    job.stderr.close()
    server.refuse = lambda _: None
    with hold(kvstore_at(URL)):  # without waiting: its owner is dead
        complete(URL, schema("int8"))
    complete(tmp_path / "whole.zarr", schema("int8"))
    assert server.contents(PREFIX) == contents(tmp_path / "whole.zarr")


def test_a_batch_asks_for_its_rows_alone_and_for_each_index_once(server: Server) -> None:
    complete(URL, schema("float16"))
    store = open_store(URL)
    server.requests.clear()
    rows = [4, 0, 3]
    tokens = store.read("train", rows)
    for layer in LAYERS:
        assert (tokens[layer] == expected("train", layer, "float16")[rows]).all()
    assert asked_for(server) == {"index": 3 * len(LAYERS), "rows": 3 * len(LAYERS)}
    server.requests.clear()
    store.read("train", [0, 3, 4])
    assert asked_for(server) == {"rows": 3 * len(LAYERS)}


def asked_for(server: Server) -> dict[str, int]:
    """The number of requests for rows, indices (the end of a file) and whole files."""

    def part(request: Request) -> str:
        return "index" if request.byte_range.startswith("bytes=-") else "rows" if request.byte_range else "whole files"

    return Counter(part(request) for request in server.requests if "/c/" in request.key)


def test_a_shard_costs_the_requests_that_the_documents_say(server: Server) -> None:
    wanted, arrays = schema("int8"), 2 * len(LAYERS)  # values and scales
    create(URL, wanted)
    with hold(kvstore_at(URL), 60.0, 60.0) as lock:
        writer = StoreWriter(kvstore_at(URL), wanted, lock)
        server.requests.clear()
        commit(URL, writer, wanted, "train", 0, skip=())
        reading_rms = 2 * len(LAYERS)  # which this `commit` repeats, but a job does once
        asked = Counter(request.method for request in server.requests)
    assert asked == {"PUT": arrays + 6, "GET": arrays + 3 + reading_rms, "HEAD": 3}


def unmark(split: str, shards: list[int]) -> None:
    kvstore = kvstore_at(URL)
    with hold(kvstore) as lock:
        StoreWriter(kvstore, require_store(kvstore), lock).unmark(split, shards)


def test_a_shard_that_is_replaced_is_read_anew(server: Server) -> None:
    """With compression, so that an index of the old shard would point to the wrong bytes of the new one."""
    wanted = schema("float32", "zstd")
    store = complete(URL, wanted)
    before = store.read("train", [2, 3])
    assert (before[0] == values("train", 0)[2:4]).all()
    unmark("train", [1])
    with pytest.raises(JobError, match="shard 1 of train"):
        store.read("train", [2, 3])
    writer = create(URL, wanted)
    commit(URL, writer, wanted, "train", 1, skip=[3])  # zeros in row 3: another length
    after = store.read("train", [2, 3])
    assert (after[0][0] == before[0][0]).all()
    assert (after[0][1] == 0).all()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-9], lambda b: b"", None],
    ids=["flipped", "cut", "empty", "missing"],
)
def test_damage_is_found_and_repaired(server: Server, tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    complete(URL, schema("int8"))
    assert verify_store(URL).ok
    kvstore, key = kvstore_at(URL), "train/layer_02/c/1/0/0"
    if damage:
        kvstore.write_bytes(key, damage(kvstore.read_bytes(key) or b""))
    else:
        kvstore.remove("train/layer_02/c/1")
    report = verify_store(URL)
    assert damaged_shards(report) == {"train": [1]}
    with pytest.raises(JobError, match="shard 1 of train"):
        open_store(URL).read("train", [2, 3])
    unmark("train", damaged_shards(report)["train"])
    complete(URL, schema("int8"))
    assert verify_store(URL).ok
    complete(tmp_path / "whole.zarr", schema("int8"))
    assert server.contents(PREFIX) == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("refusal", [("503 Slow Down", "SlowDown"), ("403 Forbidden", "AccessDenied")])
def test_a_server_that_fails_is_not_taken_for_damage(server: Server, refusal: tuple[str, str]) -> None:
    complete(URL, schema("int8"))
    server.refuse = lambda request: refusal if "layer_02/c/1" in request.key else None
    with pytest.raises(OutageError, match=f"HTTP {refusal[0][:3]}"):
        verify_store(URL)
    server.refuse = lambda request: refusal if "label/zarr.json" in request.key else None
    with pytest.raises(OutageError, match=f"HTTP {refusal[0][:3]}"):
        verify_store(URL)


def test_a_second_job_is_refused(server: Server) -> None:
    with (
        hold(kvstore_at(URL)),
        pytest.raises(JobError, match=rf"{URL}/ is in use by .* \(process {os.getpid()} on "),
        hold(kvstore_at(URL)),
    ):
        raise AssertionError
    with hold(kvstore_at(URL)):
        pass
    assert not kvstore_at(URL).keys()


def at_once(server: Server) -> list[Lock]:
    """Let two jobs find a lock free at the same time; returns those that believe they acquired it.

    Neither writes before the server has told both that the lock is free.
    """
    both, writes = Barrier(2, timeout=30), count()

    def wait(request: Request) -> None:
        if request.method == "PUT" and request.key == LOCK_KEY and next(writes) < 2:
            both.wait()

    server.refuse = wait
    locks = [Lock(kvstore_at(URL), 60.0, 60.0) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        reached = [pool.submit(lock.acquire) for lock in locks]
    outcomes = [one.exception() for one in reached]
    assert all("is in use by" in str(failed) for failed in outcomes if failed)
    return [lock for lock, failed in zip(locks, outcomes, strict=True) if not failed]


def test_of_two_jobs_that_start_at_once_one_gets_the_store(server: Server) -> None:
    (lock,) = at_once(server)
    lock.check()


def test_on_a_server_that_ignores_conditions_the_loser_finds_out_before_it_writes(server: Server) -> None:
    server.ignores_conditions = True
    with hold(kvstore_at(URL)), pytest.raises(JobError, match="is in use by"), hold(kvstore_at(URL)):
        raise AssertionError
    winner, loser = sorted(at_once(server), key=lambda lock: f'"{lock.id}"'.encode() not in stored_lock())
    winner.check()
    with pytest.raises(JobError, match=f"this job lost {URL}/ to "):
        loser.check()


def stored_lock() -> bytes:
    return kvstore_at(URL).read_bytes(f"{backend.LOCK}/zarr.json") or b""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lock_is_taken_kept_and_given_back_whatever_the_network_does(server: Server, fault: Fault) -> None:
    server.spoil = lambda request: fault if request.key == LOCK_KEY and request.attempt == 0 else None
    with hold(kvstore_at(URL), 60.0, 60.0) as lock:
        lock.check()
        lock.check()
    assert server.n_faults >= 4
    assert not kvstore_at(URL).keys()


def test_a_store_can_be_read_over_plain_http(server: Server) -> None:
    complete(URL, schema("int8"))
    address_of_all = f"{server.url}/{BUCKET}/{PREFIX}"
    with pytest.raises(OutageError, match=r"Forbidden \(HTTP 403\); give keys"):
        open_store(address_of_all)
    client = server.client()
    for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        client.put_object_acl(Bucket=BUCKET, Key=item["Key"], ACL="public-read")
    store = open_store(address_of_all)
    for split in SIZES:
        assert (store.read(split, slice(None))[0] == expected(split, 0, "int8")).all()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (("403 Forbidden", "AccessDenied"), r"AccessDenied.*HTTP 403.*; give keys .* AWS_ACCESS_KEY_ID .*AWS_PROFILE"),
        (
            ("404 Not Found", "NoSuchBucket"),
            r"cannot list s3://bucket/.*; create the bucket first, or correct its name",
        ),
        (("301 Moved", "PermanentRedirect"), r"HTTP 301.*; set AWS_REGION to the region of the bucket"),
        (("500 Oh", "InternalError"), r"All 6 retry attempts failed.*HTTP 500.*; check that the server is up"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    server: Server, tiny_config: MakeConfig, refusal: tuple[str, str], message: str
) -> None:
    server.refuse = lambda _: refusal
    with pytest.raises(OutageError, match=message) as caught:
        sc.extract(tiny_config(f"store.path={URL}"))
    assert "\n" not in str(caught.value)


def test_a_server_without_conditional_writes_is_named(server: Server) -> None:
    server.refuse = lambda request: (
        ("501 Not Implemented", "NotImplemented") if request.method == "PUT" and request.condition else None
    )
    with (
        pytest.raises(OutageError, match=r"HTTP 501.*; choose a server that has conditional writes"),
        hold(kvstore_at(URL)),
    ):
        raise AssertionError


def test_a_dead_server_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        quick_retries(monkeypatch)
        with pytest.raises(
            OutageError, match=r"Could not connect to server; check that the server is up .*AWS_ENDPOINT"
        ):
            open_store(URL)


SILENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from store import address
from store.reader import open_store
address._RETRIES = {{**{QUICK}, "max_retries": 1}}
open_store({URL!r})
"""


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, since tensorstore reads its limits once."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        named = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",  # an existing value is kept
        }
        command = [sys.executable, "-c", SILENT]
        done = subprocess.run(command, env={**os.environ, **named}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "OutageError: cannot read" in done.stderr
    assert "Less than 1 bytes/sec transferred the last 1 seconds; check that the server is up" in done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("az://container/cache.zarr", r'unsupported URL scheme "az".*; legal are a folder, file://, s3://, gs://'),
        ("s3://Not_A_Bucket!/cache.zarr", r"Invalid S3 bucket name.*; legal are"),
    ],
)
def test_an_address_that_cannot_be_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_store(path)


def test_an_endpoint_must_be_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL_S3 is 'localhost:9000', .*such as http://localhost:9000"):
        open_store(URL)


def test_the_endpoint_of_s3_goes_before_that_of_all_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://everything")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example/")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    spec = address.kvstore_spec(f"s3://{BUCKET}/a%20b/")
    assert (spec["endpoint"], spec["aws_region"], spec["path"]) == ("https://s3.example", "eu-north-1", "a b/")
    assert np.all([word not in address.kvstore_spec("gs://bucket/x/") for word in ("endpoint", "aws_region")])
