"""The scripts of benchmarks/ as their users call them, at a small size; what they measure is not judged here."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapt.config.pipeline import Config
from benchmarks.ablation import VARIANTS
from benchmarks.extracting import extract
from benchmarks.made_up import StoreShape, write_store
from benchmarks.record import machine
from benchmarks.views import ROUNDS
from benchmarks.views import VARIANTS as VIEW_VARIANTS
from extract.backbones.backbone import load_backbone
from extract.sources.open_source import open_source

Run = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
# Each in a process forked from one that has imported what takes long, with the path that Python gives it.
SHOW_HELP = """
import os, runpy, sys, traceback
import adapt.training.search, extract.sources.open_source, peft, timm, torch

def show_help(script):
    sys.argv = [script, "--help"]
    if script.endswith(".py"):
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)

for script in sys.argv[1:]:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            show_help(script)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    if os.waitpid(process, 0)[1]:
        print("FAILED", script, file=sys.stderr, flush=True)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Calls a script with its arguments; what it keeps in its file, which must say what made it."""

    def call(script: str, *arguments: Any) -> dict[str, Any]:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--out", str(out)])
        importlib.import_module(f"benchmarks.{script}").main()
        found: dict[str, Any] = json.loads(out.read_text())
        assert set(machine()) <= set(found)
        return found

    return call


@pytest.fixture
def pipeline(tiny_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A pipeline file of small photographs and a small backbone."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
    return path


@pytest.mark.slow  # imports all of torch
def test_every_script_starts_from_the_repositorys_root() -> None:
    """As its docstring says: `python -m benchmarks.NAME`, or the path of an example."""
    scripts = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    scripts += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").rglob("*.py"))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SHOW_HELP, *scripts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stderr, done.stderr
    for script in ("torture", "fuzz", "tables", "training"):
        assert f"benchmarks.{script}" in scripts
    assert "examples/fractal_vit/pretrain.py" in scripts


@pytest.mark.slow  # a DataLoader's workers import all of torch
def test_extracting(run: Run, pipeline: Path) -> None:
    found = run("extracting", pipeline, "--rounds", 1)
    assert found["images"] == 36
    assert set(found["images_per_second"]) == {"sidecache", "forward only", "bare timm"}
    assert found["store write / raw write"] > 0


def test_probe(run: Run, pipeline: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    extract(config, open_source(config.data), load_backbone(config.backbone), Path(config.store.path))
    found = run("probe", pipeline, "--rounds", 1)
    assert set(found["seeds"]) == {"0"}
    assert set(found["means"]) == {"linear_probe", "scikit-learn", "scikit-learn, tol=1e-6"}


def test_one_pass(run: Run, pipeline: Path, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    extract(config, open_source(config.data), load_backbone(config.backbone), Path(config.store.path))
    found = run("one_pass", pipeline, "--rounds", 1, "--poolings", "cls", "mean", "--seeds", 0)
    (probe,), (attentive,), (losa,) = (found[line].values() for line in ("probe", "attentive", "losa"))
    assert (probe["settings"], attentive["settings"], losa["settings"]) == (32, 20, 16)
    assert set(probe["seconds of a setting alone"]) == {"cls", "mean"}
    assert min(probe["pass / setting alone"], attentive["one pass / runs"], losa["halving / runs"]) > 0
    assert losa["points behind the choice of all, by seed"]["0"] >= 0


def test_ablation(run: Run, tmp_path: Path) -> None:
    write_store(tmp_path / "made-up.zarr", StoreShape(samples=24, layers=6, grid=(2, 2), dim=16, shard_samples=8))
    small = (tmp_path / "made-up.zarr", "--epochs", 1, "--seeds", 1)
    found = run("ablation", *small)
    trained = {method: set(variants) for method, variants in found["results"].items() if method != "linear_probe"}
    assert trained == {method: set(variants) for method, variants in VARIANTS.items()}
    assert run("ablation", *small) == found
    with pytest.raises(SystemExit):
        run("ablation", *small, "--limit", 12)


def test_views(run: Run, tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config().model_dump(mode="json")
    parts = {"datasets": {"small": config.pop("data")}, "backbones": {"tiny": config.pop("backbone")}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"run_dir": config["run_dir"], **parts, "methods": ["losa"]}))
    found = run("views", tmp_path / "study.yaml", "--seeds", 1, "--epochs", 2)["results"]["small"]
    assert all(set(scores) == set(VIEW_VARIANTS) for scores in found["scores"].values())
    assert len(found["seconds"]["resident, 8"]) == ROUNDS


def test_predicting(run: Run, pipeline: Path, image_folder: Path) -> None:
    found = run("predicting", pipeline, image_folder, "--rounds", 1, "--images", 40)
    assert found["images"] == 40
    assert set(found["images_per_second"]) == {"extract", "one", "four"}
    assert min(found["rate of one / extract"], found["time of four / one"]) > 0


@pytest.mark.slow  # a job of half a minute
def test_plans(run: Run) -> None:
    (case,) = run("plans", "--only", "digits, 20 MB/s: LoSA, 1 epoch")["cases"].values()
    assert set(case["actual"]) == {"online", "resident", "streamed"}
    assert case["actual"]["streamed"]["extract"] > 179 / 20  # the disk is slow


def test_streamed_memory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it lays its store
    found = run("streamed_memory", "--gib", 0.03, "--samples-trained", 4)
    assert found["store_bytes"] > 0.03 * 2**30
    assert found["bytes_above_idle"] > 0


def test_formats(run: Run, real_data: Path) -> None:
    found = run("formats", "--images", 4)
    assert {"int8", "float16", "bfloat16"} <= {name.split(",")[0] for name in found["formats"]}


def test_video(run: Run, real_data: Path) -> None:
    pytest.importorskip("decord", reason="decord is not installed: nothing to compare with")
    found = run("video", real_data / "videos", "--clips", 4, "--frames", 2, "--rounds", 1, "--memory", 4)
    assert found["clips"] == 4
    assert len(found["memory_mib_by_quarter"]) == 4
