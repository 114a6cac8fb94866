"""Shapes in signatures are checked while tests run; fixtures build small real backbones, sources and stores."""

import importlib
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: a test that reached for a hub would wait for the network
install_import_hook(["adapt", "extract", "store"], "beartype.beartype")

import sidecache  # noqa: E402

# The commands import their modules when they are called. A test that patches a name first would leave the patched one
# in a module that is imported then, for all tests that follow.
for _module in pkgutil.iter_modules(sidecache.__path__, "sidecache."):
    importlib.import_module(_module.name)

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_vit import TINY  # noqa: E402

from adapt.config.load_config import load_config  # noqa: E402
from adapt.config.pipeline import Config  # noqa: E402
from extract.backbones.backbone import TimmBackbone, load_backbone  # noqa: E402
from extract.config import BackboneConfig  # noqa: E402

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")
torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and weights."""
    if "SIDECACHE_DATA" not in os.environ:
        pytest.skip("SIDECACHE_DATA is not set: no real images and weights here")
    return Path(os.environ["SIDECACHE_DATA"])


@pytest.fixture(scope="session")
def tiny_backbone() -> TimmBackbone:
    """A ViT of 3 blocks, 32 wide, on 32 x 32 images: 1 class token and a 4 x 4 grid."""
    return load_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=TINY)
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two splits of three classes that differ in color and pattern: 24 training and 12 test images of 40 x 32."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for k, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 90, (32, 40, 3))
                pixels[:, :: k + 2, k] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def tiny_config(image_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A whole job that takes a second: call it with overrides such as `"store.dtype=int8"`."""

    def build(*overrides: str) -> Config:
        document = {
            "run_dir": str(tmp_path / "run"),
            "data": {"source": "folder", "root": str(image_folder), "val_fraction": 0.25},
            "backbone": {
                "name": "vit_tiny_patch16_224",
                "weights": "random",
                "image_size": 32,
                "model_kwargs": dict(TINY),
            },
            "store": {"path": str(tmp_path / "cache.zarr"), "dtype": "float32", "shard_samples": 5},
            "train": {"epochs": 2, "batch_size": 8, "seeds": [0], "refit": False},
            "methods": ["linear_probe", {"name": "losa", "rank": 4, "token_rank": 2}],
        }
        return load_config(document, overrides)

    return build
