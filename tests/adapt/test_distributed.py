"""Data-parallel training gives the result of one process, and `World` broadcasts JSON values."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.run_dir.files import write_text
from adapt.training.distributed import World, _copy_results, world

ROOT = Path(__file__).parents[2]
METHODS = "methods=[linear_probe, bitfit, {name: losa, rank: 4, token_rank: 2}]"


def adaptors(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name.split("-")[0]: load_file(file) for file in (run_dir / "adaptors").glob("*.safetensors")}


def test_two_processes_train_what_one_trains(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    # SGD, since Adam amplifies rounding where a gradient is nearly zero. 18 training samples, so parts of 3.
    config = tiny_config(METHODS, "train.batch_size=6", "train.optimizer=sgd")
    alone = {row.method: row for row in sc.run(config)}
    two = config.model_copy(update={"run_dir": tmp_path / "two"})
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(two.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sidecache",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "run", str(file)], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best on validation is") == 1, "one process prints the table"
    ours, theirs = adaptors(config.run_dir), adaptors(two.run_dir)
    assert set(ours) == set(theirs) == set(alone)
    for method, tensors in ours.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(theirs[method][name], tensor, rtol=1e-4, atol=1e-5)


def test_another_process_copies_results_and_searches_but_no_store(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for name in ("results.json", "search/s.json", "cache.zarr/train/c/0", ".run.lock"):
        write_text(run / name, "x")
    copy.mkdir()
    _copy_results(run, copy)
    assert {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()} == {
        "results.json",
        "search/s.json",
    }


@pytest.mark.parametrize(
    "value", [None, "séparé\n", "\ud800", [], {"train": [0, 2**62, -1], "test": []}, ["streamed", "why"]]
)
def test_a_broadcast_value_reaches_the_others(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    assert World(0, 2).broadcast(value) == value
    arriving = iter(sent)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(next(arriving)))
    assert World(1, 2).broadcast("its own value") == value


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world() == World(0, 1)
    assert world().is_main_process
    assert World(1, 3).shard([0, 1, 2, 3, 4]) == [1, 4]
    assert World(2, 3).shard([0]) == []
