"""A study of seconds: two data sets and two backbones, with everything in one folder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_vit import TINY


def draw_datasets(folder: Path, *names: str) -> None:
    """Folders of images of two classes that differ in color: 12 training and 8 test images each."""
    for number, name in enumerate(names):
        draw = np.random.default_rng(number)
        for split, count in (("train", 6), ("test", 4)):
            for k, label in enumerate(("blue", "red")):
                (folder / name / split / label).mkdir(parents=True)
                for image in range(count):
                    pixels = draw.integers(0, 90, (32, 32, 3))
                    pixels[:, :, 2 * k] += 150
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / name / split / label / f"{image}.png")


def document(*names: str, **changes: Any) -> dict[str, Any]:
    """A study of these data sets and one backbone, or several of `backbones`."""
    return {
        "name": "small",
        "run_dir": "runs",
        "datasets": {name: {"source": "folder", "root": f"images/{name}", "val_fraction": 0.34} for name in names},
        **({} if "backbones" in changes else {"backbone": backbone()}),
        "store": {"dtype": "float32", "shard_samples": 5},
        "train": {"epochs": 1, "batch_size": 8, "seeds": [0], "device": "cpu", "refit": False},
        "extract": {"device": "cpu"},
        "methods": ["linear_probe"],
        **changes,
    }


def backbone(depth: int = 3) -> dict[str, Any]:
    """The section of a small ViT with random weights."""
    kwargs = TINY | {"depth": depth}
    return {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": kwargs}


def write_study(folder: Path, *names: str, **changes: Any) -> Path:
    """Draw data sets, and write a study of them."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    draw_datasets(folder / "images", *names)
    (folder / "study.yaml").write_text(yaml.safe_dump(document(*names, **changes), sort_keys=False))
    return folder / "study.yaml"
