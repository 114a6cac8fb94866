"""With many workers the store is byte for byte that of one process, even if workers fail."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from distributed import LocalCluster, Security
from small_store import contents
from tiny_vit import TINY
from trapped_source import Trap, lay_traps

from extract.backbones.backbone import TimmBackbone, load_backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.job.extraction import Extraction, extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.job.task_plugin import device_of_worker
from extract.job.workers import Workers
from extract.sources.open_source import ImageSource, open_source
from store.config import StoreConfig
from store.errors import JobError, UserError
from store.verify import verify_store

BACKBONE_CONFIG = BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY)
pytestmark = [
    pytest.mark.slow,
    # by dask: sockets of killed processes, event loops that close while a worker restarts
    pytest.mark.filterwarnings("default"),
]


def extract(source: ImageSource, data: DataConfig, store: Path, dtype: str = "int8", **config: Any) -> Extraction:
    stored = StoreConfig(path=str(store), shard_samples=2, dtype=dtype)  # type: ignore[arg-type]
    options = ExtractConfig(device="cpu", batch_size=1, **config)
    job = ExtractionJob(
        source=source,
        backbone=load_backbone(BACKBONE_CONFIG),
        data=data,
        store=stored,
        extract=options,
        backbone_config=BACKBONE_CONFIG,
    )
    return extract_tokens(job)


@pytest.fixture
def data(image_folder: Path) -> DataConfig:
    return DataConfig(source="folder", root=image_folder)


@pytest.fixture
def serial(data: DataConfig, tmp_path: Path) -> dict[str, bytes]:
    """The store of one process: 12 shards of training samples and 6 of test samples."""
    extract(open_source(data), data, tmp_path / "serial.zarr")
    return contents(tmp_path / "serial.zarr")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a running cluster of two workers."""
    with LocalCluster(n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


def test_one_worker_killed_and_one_hung_cost_their_shards_alone(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path
) -> None:
    traps = {5: Trap("die", 1, tmp_path / "deaths"), 12: Trap("stop", 1, tmp_path / "stops")}
    done = extract(lay_traps(open_source(data), traps), data, tmp_path / "c.zarr", workers=3, shard_seconds=8.0)
    assert (done.shards_written, done.samples_written, done.retries) == (18, 36, 2)
    assert contents(tmp_path / "c.zarr") == serial
    assert verify_store(tmp_path / "c.zarr").ok


def test_workers_that_are_slow_to_start_again_are_waited_for(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path
) -> None:
    source = lay_traps(open_source(data), {1: Trap("die", 1, tmp_path / "a"), 3: Trap("die", 1, tmp_path / "b")})
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100 ms"}):  # dask's default is 15 s
        assert extract(source, data, tmp_path / "c.zarr", workers=2).retries == 2
    assert contents(tmp_path / "c.zarr") == serial


def test_without_a_worker_that_starts_the_job_ends(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract.job import cluster

    monkeypatch.setattr(cluster, "_START_SECONDS", 1)
    source = lay_traps(open_source(data), {1: Trap("die", 1, tmp_path / "a"), 3: Trap("die", 1, tmp_path / "b")})
    with pytest.raises(JobError, match=r"shard \d+ of (train|test) failed: NoWorkerError"):
        extract(source, data, tmp_path / "c.zarr", workers=2)


def test_a_shard_that_ends_every_worker_ends_the_job_and_the_rest_is_kept(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path
) -> None:
    deadly = lay_traps(open_source(data), {6: Trap("die", 99, tmp_path / "deaths")})
    with pytest.raises(JobError, match=r"shard 3 of train was started 4 times"):
        extract(deadly, data, tmp_path / "c.zarr", workers=2)
    assert len(list((tmp_path / "deaths").iterdir())) == 4
    done = extract(open_source(data), data, tmp_path / "c.zarr")
    assert 1 <= done.shards_written < 18
    assert contents(tmp_path / "c.zarr") == serial


def test_a_running_scheduler_serves_several_jobs(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    for name in ("a.zarr", "b.zarr"):
        assert extract(open_source(data), data, tmp_path / name, scheduler=scheduler, workers=2).retries == 0
        assert contents(tmp_path / name) == serial


def test_a_temporary_fault_is_retried_and_counted(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    source = lay_traps(open_source(data), {3: Trap("fail", 2, tmp_path / "faults")})
    assert extract(source, data, tmp_path / "c.zarr", scheduler=scheduler).retries == 2
    assert contents(tmp_path / "c.zarr") == serial
    lasting = lay_traps(open_source(data), {3: Trap("fail", 99, tmp_path / "lasting")})
    with pytest.raises(JobError, match="the disk blinked"):
        extract(lasting, data, tmp_path / "d.zarr", scheduler=scheduler)
    assert len(list((tmp_path / "lasting").iterdir())) == 4


def test_a_sample_that_cannot_be_decoded_is_an_error_at_once_or_skipped(
    data: DataConfig, tmp_path: Path, scheduler: str
) -> None:
    assert data.root is not None
    (data.root / "train/green/3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"green/3\.png.* cannot be decoded"):
        extract(open_source(data), data, tmp_path / "c.zarr", scheduler=scheduler)
    skipping = data.model_copy(update={"on_error": "skip"})
    many = extract(open_source(skipping), skipping, tmp_path / "c.zarr", scheduler=scheduler).store
    one = extract(open_source(skipping), skipping, tmp_path / "one.zarr").store
    assert many.skipped("train") == one.skipped("train")
    assert len(many.skipped("train")) == 1
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "one.zarr")


def test_workers_that_see_other_files_are_refused(
    data: DataConfig, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster whose machines have different disks: a file changes after it was listed."""
    from extract.job import cluster_extraction

    connect = cluster_extraction.connect

    def change_first(workers: Workers) -> Any:
        assert data.root is not None
        file = data.root / "train/red/0.png"
        file.write_bytes((data.root / "train/red/1.png").read_bytes())
        return connect(workers)

    monkeypatch.setattr(cluster_extraction, "connect", change_first)
    with pytest.raises(JobError, match=r"sample 'train/red/0\.png' of train differs on this worker from the one that"):
        extract(open_source(data), data, tmp_path / "c.zarr", scheduler=scheduler)


def test_a_users_own_backbone_is_sent_to_the_workers(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path, scheduler: str, tiny_backbone: TimmBackbone
) -> None:
    stored = StoreConfig(path=str(tmp_path / "c.zarr"), shard_samples=2, dtype="int8")
    options = ExtractConfig(device="cpu", batch_size=1, scheduler=scheduler)
    source = open_source(data)
    extract_tokens(ExtractionJob(source=source, backbone=tiny_backbone, data=data, store=stored, extract=options))
    assert contents(tmp_path / "c.zarr") == serial


def test_a_scheduler_that_does_not_answer_is_named(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract.job import cluster

    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"no dask scheduler answers at extract\.scheduler 'tcp://127\.0\.0\.1:9'"):
        extract(open_source(data), data, tmp_path / "c.zarr", scheduler="tcp://127.0.0.1:9")


def test_a_scheduler_with_tls_is_reached_with_the_files_of_dask_s_configuration(
    data: DataConfig, serial: dict[str, bytes], tmp_path: Path
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-out", certificate]
    subprocess.run([*make, "-keyout", key], check=True, capture_output=True)
    tls = {"distributed.comm.require-encryption": True, "distributed.comm.tls.ca-file": certificate}
    for role in ("scheduler", "worker", "client"):
        tls |= {f"distributed.comm.tls.{role}.cert": certificate, f"distributed.comm.tls.{role}.key": key}
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(tls),
        LocalCluster(n_workers=1, threads_per_worker=1, protocol="tls://", security=Security(), **here) as cluster,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        extract(open_source(data), data, tmp_path / "c.zarr", scheduler=cluster.scheduler_address)
    assert contents(tmp_path / "c.zarr") == serial


def test_local_workers_and_their_scheduler_listen_on_loopback_alone() -> None:
    from extract.job.cluster import connect

    before = _listening()
    with connect(Workers(section="extract", count=2, scheduler=None)):
        opened = _listening() - before
    assert len(opened) >= 3  # a scheduler and two workers
    assert {host for host, _ in opened} == {"127.0.0.1"}


def _listening() -> set[tuple[str, int]]:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [socket for process in processes for socket in process.net_connections("tcp")]
    return {tuple(socket.laddr) for socket in found if socket.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        (5, "cuda:1"),
        ("5", "cuda:1"),
        ("node-2-3", "cuda:3"),
        ("tcp://node-1:3456", "auto"),
        ("SLURM-4", "cuda:0"),
    ],
)
def test_workers_that_see_several_gpus_share_them_by_their_numbers(
    name: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of_worker("auto", name) == device
    assert device_of_worker("cuda:2", name) == "cuda:2"
    assert device_of_worker("cpu", name) == "cpu"
