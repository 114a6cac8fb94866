"""The mode of every file that a job writes follows the umask, whatever library writes it."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

import sidecache as sc
from adapt.config.pipeline import Config
from store.local.durable_files import replacing

UMASKS = (0o022, 0o027)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes_below(*folders: Path) -> dict[str, set[str]]:
    """Kind -> the modes of all folders and files."""
    found: dict[str, set[str]] = {"folders": set(), "files": set()}
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            kind = "folders" if path.is_dir() else "files"
            found[kind].add(oct(stat.S_IMODE(path.stat().st_mode)))
    return found


@pytest.mark.parametrize("mask", UMASKS)
def test_files_of_a_run_and_its_store_follow_the_umask(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    """Checkpoints are kept here: a job deletes them at its end."""
    monkeypatch.setattr("adapt.training.checkpoint._SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("adapt.job.training_job.delete_checkpoints", lambda checkpoint: None)
    losa = "{name: losa, rank: 2, sweep: {lr: [0.001, 0.01]}}"
    config = tiny_config(f"methods=[{losa}, linear_probe, bitfit]", "train.tensorboard=true")
    with umask(mask):
        sc.run(config)
    store = Path(config.store.path)
    names = {path.suffix for folder in (config.run_dir, store) for path in folder.rglob("*")}
    assert {".safetensors", ".json", ".csv", ".html", ".yaml", ".parquet", ".pt"} <= names
    wanted = {"files": {oct(0o666 & ~mask)}, "folders": {oct(0o777 & ~mask)}}
    assert modes_below(config.run_dir, store) == wanted


@pytest.mark.parametrize("mask", UMASKS)
def test_a_file_that_a_library_makes_private_follows_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "a.safetensors"
    with umask(mask), replacing(path) as partial:
        save_file({"x": zeros(1)}, partial)
        partial.chmod(0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
