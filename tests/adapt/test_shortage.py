"""Running out of memory ends in one message and exit status 1, and committed shards are kept."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_store import contents
from tiny_vit import TINY

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.training.checkpoint import Checkpoint
from extract.backbones.backbone import load_backbone
from extract.config import BackboneConfig
from store.io_errors import failure
from store.out_of_memory import is_shortage

ROOT = Path(__file__).parents[2]
ALLOCATION = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
SHORTAGES = [
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(ALLOCATION),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ImportError("libgomp.so.1: cannot open shared object file: Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ImportError("No module named 'x'"),
    ValueError("out of memory"),  # may be one of our messages
]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
@pytest.mark.parametrize("command", ["run", "extract", "train"])
def test_a_shortage_is_one_line(
    command: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline.yaml").write_text("backbone: {weights: random}")
    monkeypatch.setattr(sc, command, raising(error))
    monkeypatch.setattr("sys.argv", ["sidecache", command, str(tmp_path / "pipeline.yaml")])
    with pytest.raises(SystemExit) as done:
        sc.main()
    assert done.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "out of memory" in line
    assert "lower train.batch_size or extract.batch_size" in line


@pytest.mark.parametrize(
    ("error", "expected"), [*((e, True) for e in SHORTAGES), *((e, False) for e in OTHERS)], ids=str
)
def test_shortages_are_distinguished_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_shortage(error) == expected


@pytest.mark.parametrize("place", ["timm.create_model", "extract.backbones.weights.read_tensors"])
def test_a_shortage_is_not_reported_as_bad_weights(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(1 << 20))
    config = BackboneConfig(name="vit_tiny_patch16_224", weights=str(file), image_size=32, model_kwargs=TINY)
    monkeypatch.setattr("extract.backbones.weights.require_room", lambda *_: None)
    monkeypatch.setattr(place, raising(RuntimeError(ALLOCATION)))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_backbone(config)


def test_a_shortage_is_not_reported_as_a_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checkpoint"
    torch.save({}, file)
    monkeypatch.setattr(torch, "load", raising(RuntimeError(ALLOCATION)))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Checkpoint(file, [], torch.device("cpu")).load()


def test_a_store_that_cannot_be_mapped_says_what_to_do() -> None:
    refused = failure(OSError(errno.ENOMEM, "Cannot allocate memory"), "read x")
    assert "free memory, or raise its limit (`ulimit -v`)" in str(refused)


LIMITED = """
import os, resource, sys
import psutil, torch
import sidecache, adapt.job.training_job, adapt.report.page, extract.job.extraction, sklearn.datasets
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
room = psutil.Process().memory_info().vms + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
sidecache.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
def test_a_batch_that_does_not_fit_ends_the_job_and_keeps_the_store(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config("train.device=cpu", "extract.device=cpu", "extract.batch_size=4")
    kept = sc.extract(config)
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = contents(Path(kept.path))
    more = ["-o", "methods=[{name: losa, rank: 2, token_rank: 100000000}]"]  # 13 GB of parameters
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "run", str(file), *more],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sidecache: out of memory (")
    assert contents(Path(kept.path)) == before
    assert sc.run(config)
