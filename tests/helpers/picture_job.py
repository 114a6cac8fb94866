"""A folder with pictures of three classes and a pipeline.yaml, whose job takes a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_vit import TINY

import sidecache as sc

METHODS = ("linear_probe", {"name": "losa", "rank": 4, "token_rank": 2})


def run_picture_job(folder: Path, methods: Sequence[Any] = METHODS, weights: str = "random") -> Path:
    """Make the folder's images and pipeline, run the job, and return the folder."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for k, name in enumerate(("blue", "green", "red")):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 90, (32, 40, 3))
                pixels[:, :: k + 2, k] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / name / f"{number}.png")
    document = {
        "run_dir": "run",
        "data": {"source": "folder", "root": "images", "val_fraction": 0.25},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": weights, "image_size": 32, "model_kwargs": TINY},
        "store": {"path": "cache.zarr", "dtype": "float32", "shard_samples": 5},
        "train": {"epochs": 2, "batch_size": 8, "seeds": [0], "lr": 0.01, "refit": False},
        "methods": list(methods),
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document))
    sc.run(sc.load_config(folder / "pipeline.yaml"))
    return folder
