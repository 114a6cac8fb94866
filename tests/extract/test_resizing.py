"""A thin image is refused by name before it is resized, so that the memory of a resize is bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

import sidecache as sc
from adapt.features.image_batches import ImageBatches
from extract.backbones.augmentation import Augment
from extract.backbones.backbone import TimmBackbone
from extract.backbones.preprocessing import build_transform
from extract.config import DataConfig
from extract.images.resize_limit import ResizeError, ResizeLimit, check_resize
from extract.sources.open_source import open_source
from store.errors import UserError

ROOT = Path(__file__).parents[2]
THIN = [(600_000, 1), (1, 600_000)]
CONFIGS: dict[str, dict[str, Any]] = {
    "center": {"input_size": (3, 224, 224), "crop_pct": 0.9},
    "not square": {"input_size": (3, 224, 192), "crop_pct": 0.9},
    "squash": {"input_size": (3, 224, 224), "crop_mode": "squash"},
    "border": {"input_size": (3, 224, 224), "crop_mode": "border"},
}


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize("name", ["center", "not square", "border"])
def test_a_thin_image_is_refused_by_every_crop_mode_that_keeps_the_ratio(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ResizeError, match="crop or remove it"):
        build_transform(CONFIGS[name])(Image.new("RGB", size))


def test_rows_that_are_resized_before_the_columns_count_too() -> None:
    squash, draw = build_transform(CONFIGS["squash"]), np.random.default_rng(0)
    assert squash(Image.new("RGB", (600_000, 1))).shape == (3, 224, 224)
    for transform in (squash, lambda image: Augment({**CONFIGS["center"], "interpolation": "bicubic"})(image, draw)):
        with pytest.raises(ResizeError, match=r"its 1 x 600000 pixels become \d+,\d+,000 during the resize"):
            transform(Image.new("RGB", (1, 600_000)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(40, 4000), (4000, 40), (224, 224), (1, 1), (300, 2)])
def test_other_images_go_through_timms_own_steps(name: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 90))
    ours, timms = build_transform(CONFIGS[name]), create_transform(**CONFIGS[name], is_training=False)
    assert ours(image).equal(timms(image))


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["center", "not square", "border"]))
def test_the_size_that_is_checked_is_the_one_that_timm_makes(width: int, height: int, name: str) -> None:
    steps = build_transform(CONFIGS[name]).transforms  # type: ignore[attr-defined]
    limit = next(step for step in steps if isinstance(step, ResizeLimit))
    expected = limit._resized(width, height)
    if 0 in expected or expected[0] * expected[1] > 100_000:  # the others take time
        return
    made = steps[1](Image.new("L", (width, height))).size
    assert np.abs(np.subtract(made, expected)).max() <= 1


def test_the_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    check_resize(10, 1, Image.MAX_IMAGE_PIXELS, 1)
    with pytest.raises(ResizeError):
        check_resize(10, 1, Image.MAX_IMAGE_PIXELS + 1, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check_resize(10, 10, 10**6, 10**6)


def add_thin_image(folder: Path) -> Path:
    Image.new("RGB", (4_000_000, 1)).save(folder / "train" / "red" / "thin.png")
    return folder / "train" / "red" / "thin.png"


JOB = """
import json, resource, sys, torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # of address space; the image would take 16 GB
import sidecache as sc
config = sc.load_config(json.loads(sys.argv[1]))
sc.run(config)
skipped = sc.open_store(config.store.path).skipped("train")
adaptor = sc.load_adaptor(next((config.run_dir / "adaptors").glob("*.safetensors")))
try:
    adaptor.predict([config.data.root / "train/red/thin.png"])
except sc.UserError as error:
    print(json.dumps([skipped, str(error)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of address space")
def test_a_job_skips_a_thin_image_and_predict_refuses_it(tiny_config: Any, image_folder: Path) -> None:
    add_thin_image(image_folder)
    config = tiny_config("data.on_error=skip", "methods=[linear_probe]").model_dump(mode="json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOB, json.dumps(config)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    skipped, refusal = json.loads(done.stdout.splitlines()[-1])
    assert list(skipped) == ["train/red/thin.png"]
    for message in (skipped["train/red/thin.png"], refusal):
        assert "thin.png' cannot be decoded: its 4000000 x 1 pixels become" in message


def test_a_job_that_skips_nothing_names_a_thin_image(tiny_config: Any, image_folder: Path) -> None:
    add_thin_image(image_folder)
    with pytest.raises(UserError, match=r"'train/red/thin\.png' cannot be decoded: its 4000000 x 1 pixels become"):
        sc.extract(tiny_config())


@pytest.mark.parametrize("view", [None, (0, 0)], ids=["evaluation", "augmentation"])
def test_end_to_end_training_names_a_thin_image(view: Any, image_folder: Path, tiny_backbone: TimmBackbone) -> None:
    thin = add_thin_image(image_folder)
    Image.new("RGB", (1, 4_000_000)).save(thin)
    source = open_source(DataConfig(source="folder", root=image_folder))
    rows = {"train": np.arange(len(source.splits["train"]))}
    device = next(tiny_backbone.module.parameters()).device
    batches = ImageBatches(source=source, backbone=tiny_backbone, device=device, rows=rows, view=view)
    with pytest.raises(UserError, match=r"'train/red/thin\.png' cannot be decoded: its 1 x 4000000 pixels become"):
        list(batches.batches("train", [rows["train"]], [0]))
