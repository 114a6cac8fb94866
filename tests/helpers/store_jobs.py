"""Runs all commands on a small store, next to files (the victim) that no command may touch."""

import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_vit import TINY

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.job.extraction import repair
from adapt.job.inputs import Inputs
from extract.backbones.backbone import TimmBackbone
from extract.sources.open_source import open_source
from store.errors import JobError
from store.inspect import describe_store
from store.reader import open_store
from store.verify import verify_store

SPLITS, SHARD = {"train": 6, "test": 2}, 4
FORMATS = {"plain": ["store.dtype=int8"], "compressed": ["store.dtype=float16", "store.compressor=zstd"]}


def draw_images(folder: Path, names: str, split: str) -> None:
    """Draw noise, in two classes; `names` are one letter each."""
    for k, name in enumerate(names):
        (folder / split / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([k, len(split)]).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / "ab"[k % 2] / f"{name}.png")


class Jobs:
    """The commands, on a store with two of three layers."""

    def __init__(self, folder: Path, backbone: TimmBackbone, form: str) -> None:
        self.folder, self._backbone, self._form = folder, backbone, form
        self.store = folder / "cache.zarr"
        for split, count in SPLITS.items():
            for name in ("images", "more"):
                draw_images(folder / name, "cdefgh"[:count], split)
        draw_images(folder / "more", "cdefghij", "train")
        self.sources = {name: open_source(self._config(name).data) for name in ("images", "more")}

    def _config(self, images: str = "images", layers: str = "[0, 2]", store: Path | None = None) -> Config:
        document = {
            "run_dir": str(self.folder / "run"),
            "data": {"source": "folder", "root": str(self.folder / images), "val_fraction": 0.34},
            "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
            "store": {"path": str(store or self.store), "shard_samples": SHARD},
            "train": {"epochs": 1, "batch_size": 4, "seeds": [0], "device": "cpu"},
            "extract": {"device": "cpu"},
            "methods": ["linear_probe"],
        }
        return load_config(document, [f"store.layers={layers}", *FORMATS[self._form]])

    def _extract(self, images: str = "images", layers: str = "[0, 2]", store: Path | None = None) -> None:
        sc.extract(self._config(images, layers, store), self.sources[images], self._backbone)

    def make(self, store: Path) -> None:
        """Extract to another store."""
        self._extract(store=store)

    def inspect(self) -> None:
        """Describe the store."""
        describe_store(open_store(self.store))

    def verify(self) -> None:
        """Verify the store; raises JobError if it has faults."""
        report = verify_store(self.store)
        if report.faults:
            raise JobError("\n".join(report.faults))

    def repair(self) -> None:
        """Extract the first shard of each split again."""
        inputs = Inputs(self._config(), self.sources["images"], self._backbone)
        repair(self._config(), inputs, {"train": [0], "test": [0]})

    def extract(self) -> None:
        """Extract to the store, which is complete."""
        self._extract()

    def grow_samples(self) -> None:
        """Add samples."""
        self._extract("more")

    def grow_layers(self) -> None:
        """Add a layer."""
        self._extract(layers="all")

    def train(self) -> None:
        """Train from the store."""
        sc.train(self._config(), self.sources["images"], self._backbone)

    @property
    def all(self) -> dict[str, Callable[[], None]]:
        """Every command by name: first those that read the store."""
        reading = {"inspect": self.inspect, "verify": self.verify, "train": self.train}
        writing = {"repair": self.repair, "extract": self.extract}
        growing = {"grow_layers": self.grow_layers, "grow_samples": self.grow_samples}
        return {**reading, **writing, **growing}


def renew(jobs: Jobs) -> None:
    """Replace the store by a copy of `whole.zarr`, and write the victim's files."""
    if jobs.store.is_symlink():
        jobs.store.unlink()
    for name in ("cache.zarr", "victim", "run"):
        shutil.rmtree(jobs.folder / name, ignore_errors=True)
    shutil.copytree(jobs.folder / "whole.zarr", jobs.store)
    victim = jobs.folder / "victim"
    (victim / "of the store").mkdir(parents=True)
    (victim / "folder/0/0").mkdir(parents=True)
    for name in ("file", "folder/keep.txt", "folder/0/0/0", "folder/zarr.json", "folder/0.mine.__lock"):
        (victim / name).write_text(f"precious {name}")


def state(folder: Path) -> dict[str, Any]:
    """Mode, times and content of everything in a folder, by path."""
    found: dict[str, Any] = {}
    for path in [folder, *folder.rglob("*")]:
        stats = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(stats.st_mode) else None
        found[str(path.relative_to(folder))] = (stats.st_mode, stats.st_mtime_ns, stats.st_ctime_ns, content)
    return found
