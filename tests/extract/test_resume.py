"""An extraction that is killed at any moment resumes: only missing shards are extracted, and no byte differs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.filesize import decimal
from small_store import contents

from extract.backbones.backbone import TimmBackbone
from extract.config import DataConfig, ExtractConfig
from extract.job.extraction import Extraction, extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store import writer
from store.address import store_url
from store.config import StoreConfig
from store.errors import JobError, UserError
from store.kvstore import LOCK, KeyValueStore
from store.lock import BEAT_SECONDS, PATIENCE_SECONDS, Lock
from store.reader import open_store

ROOT = Path(__file__).parents[2]


def run_worker(images: Path, stores: Path, dtype: str, *more: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/helpers/resume_worker.py"), str(images), str(stores), dtype]
    command += map(str, more)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "said": done.stderr}


@pytest.mark.slow
def test_a_killed_extraction_resumes_to_the_same_bytes(image_folder: Path, tmp_path: Path) -> None:
    found = run_worker(image_folder, tmp_path, "int8")
    assert (found["status"], found["total"]) == (0, 12 + 6)  # 24 training and 12 test images, two a shard
    whole = contents(tmp_path / "whole.zarr")
    partial = 0
    for trial in found["trials"]:
        store = Path(trial["store"])
        killed = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[trial["stop"]]
        assert trial["status"] in (killed, 0), trial  # 0: it had just ended
        assert trial["resumed"] == 0, (trial, found["said"])
        assert trial["written"] == found["total"] - trial["committed"], trial
        assert contents(store) == whole, trial
        assert not list(store.rglob("*.__lock")), trial
        partial += 0 < trial["committed"] < found["total"]
    assert partial >= 1, found


@pytest.mark.slow
def test_a_killed_growth_resumes_to_the_same_bytes(image_folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "more/train/blue"
    more.mkdir(parents=True)
    for name in ("!", "3b", "z"):  # a 25th image for the last shard of two, which was full, and two beyond
        (more / f"{name}.png").write_bytes((image_folder / "train/blue/3.png").read_bytes())
    found = run_worker(image_folder, tmp_path, "int8", tmp_path / "more")
    assert (found["status"], found["total"]) == (0, 2 + 14 + 6), "two new shards of one layer, then two layers of all"
    whole = contents(tmp_path / "whole.zarr")
    for trial in found["trials"]:
        assert trial["resumed"] == 0, (trial, found["said"])
        assert contents(Path(trial["store"])) == whole, trial
        log = Path(trial["store"]) / "_log"
        left = {str(file.relative_to(log)) for file in log.rglob("*") if file.is_file() and file.suffix != ".__lock"}
        assert left == {"zarr.json"}, trial
    assert any(0 < trial["written"] < found["total"] for trial in found["trials"]), found


def extract(
    images: Path, store: Path, backbone: TimmBackbone, shard_samples: int = 5, on_error: str = "fail", **stored: Any
) -> Extraction:
    data = DataConfig(source="folder", root=images, on_error=on_error)  # type: ignore[arg-type]
    config = StoreConfig(path=str(store), shard_samples=shard_samples, **{"dtype": "int8", **stored})
    on_cpu = ExtractConfig(device="cpu")
    return extract_tokens(
        ExtractionJob(source=open_source(data), backbone=backbone, data=data, store=config, extract=on_cpu)
    )


def test_a_finished_store_is_left_alone(image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    first = extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    before = contents(tmp_path / "c.zarr")
    second = extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    assert (first.shards_written, first.samples_written) == (5 + 3, 36)
    assert (second.shards_written, second.samples_written) == (0, 0)
    assert contents(tmp_path / "c.zarr") == before


def test_a_lock_that_is_left_on_a_whole_store_is_removed(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    folder = KeyValueStore(store_url(str(tmp_path / "c.zarr")))
    Lock(folder, BEAT_SECONDS, PATIENCE_SECONDS).acquire()
    assert extract(image_folder, tmp_path / "c.zarr", tiny_backbone).shards_written == 0
    owner = folder.read_group(LOCK)
    assert owner is not None, "this process holds it, and lives"
    folder.write_group(LOCK, {**owner, "process": 2**31 - 1})  # a number that no process has
    assert extract(image_folder, tmp_path / "c.zarr", tiny_backbone).shards_written == 0
    assert [file.name for file in (tmp_path / "c.zarr/_log").iterdir()] == ["zarr.json"]


def test_a_lost_mark_is_one_shard_again(image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone) -> None:
    extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    before = contents(tmp_path / "c.zarr")
    (tmp_path / "c.zarr/train/status/c/2").unlink()
    assert extract(image_folder, tmp_path / "c.zarr", tiny_backbone).shards_written == 1
    assert contents(tmp_path / "c.zarr") == before


def test_a_shard_whose_values_cannot_be_written_is_not_marked(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise JobError("the disk refuses")

    monkeypatch.setattr(writer.StoreWriter, "write", refuse)
    with pytest.raises(JobError, match="the disk refuses"):
        extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    store = open_store(tmp_path / "c.zarr")
    assert all(store.missing_shards(split) == list(store.schema.shards(split)) for split in store.splits)


def test_locks_that_a_killed_process_left_are_no_part_of_a_store(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    before = contents(tmp_path / "c.zarr")
    for key in ("train/status/c/2", "train/layer_01/c/2/0/0"):
        (tmp_path / "c.zarr" / f"{key}.__lock").write_bytes(b"half")
        (tmp_path / "c.zarr" / key).unlink()
    assert open_store(tmp_path / "c.zarr").missing_shards("train") == [2]
    assert extract(image_folder, tmp_path / "c.zarr", tiny_backbone).shards_written == 1
    assert contents(tmp_path / "c.zarr") == before


def test_why_a_sample_was_skipped_survives_a_crash_right_after_its_shard(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "train/green/3.png").write_bytes(b"no image")
    mark = writer.StoreWriter.mark

    def crash_after(*args: Any) -> None:
        mark(*args)
        if args[1:3] == ("train", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.StoreWriter, "mark", crash_after)
        with pytest.raises(KeyboardInterrupt):
            extract(image_folder, tmp_path / "c.zarr", tiny_backbone, on_error="skip")
    store = extract(image_folder, tmp_path / "c.zarr", tiny_backbone, on_error="skip").store
    ((sample, reason),) = store.skipped("train").items()
    assert "green/3.png" in sample
    assert reason
    assert store.num_samples("train") == len(store.labels("train")) == len(store.sample_ids("train")) == 23
    labels = {name.split("/")[-2]: int(label) for name, label in zip(*_named(store), strict=True)}
    assert labels == {"blue": 0, "green": 1, "red": 2}


def _named(store: Any) -> tuple[list[str], np.ndarray]:
    return store.sample_ids("train"), store.labels("train")


def test_another_preprocessing_or_content_is_refused(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    with pytest.raises(UserError, match=r"provenance\.dtype: stored 'int8', wanted 'float32'"):
        extract(image_folder, tmp_path / "c.zarr", tiny_backbone, dtype="float32")
    (image_folder / "test/red/0.png").write_bytes((image_folder / "test/red/1.png").read_bytes())
    with pytest.raises(UserError, match=r"c\.zarr/ holds:\n  test: 1 \('test/red/0\.png'\) changed\n"):
        extract(image_folder, tmp_path / "c.zarr", tiny_backbone)


@pytest.mark.parametrize("lacking", [None, 1, 999, 12_345])
def test_a_job_that_cannot_fit_does_not_start(
    image_folder: Path,
    tmp_path: Path,
    tiny_backbone: TimmBackbone,
    monkeypatch: pytest.MonkeyPatch,
    lacking: int | None,
) -> None:
    schema = extract(image_folder, tmp_path / "fits.zarr", tiny_backbone).store.schema
    needed = 36 * schema.bytes_per_sample
    free = 0 if lacking is None else needed - lacking
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    message = f"36 samples need {decimal(needed)} at {tmp_path}/c.zarr/, {decimal(needed - free)} more than are free; "
    with pytest.raises(JobError, match=re.escape(f"{message}store fewer layers")):
        extract(image_folder, tmp_path / "c.zarr", tiny_backbone)
    assert not (tmp_path / "c.zarr").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    extract(image_folder, tmp_path / "c.zarr", tiny_backbone)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float32"])
def test_a_value_that_is_not_finite_stops_the_job_before_anything_is_written(
    image_folder: Path, tmp_path: Path, tiny_backbone: TimmBackbone, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny_backbone.tokens
    monkeypatch.setattr(
        tiny_backbone, "tokens", lambda images, layers: {k: v / (k - 1) for k, v in tokens(images, layers).items()}
    )
    with pytest.raises(JobError, match=r"sample 'train/.*', layer 1, token 0, channel 0: the value -?inf cannot be"):
        extract(image_folder, tmp_path / "c.zarr", tiny_backbone, dtype=dtype)
    assert dtype != "int8" or not (tmp_path / "c.zarr").exists()
