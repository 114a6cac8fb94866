"""Bad input to a command gives the right exit status, one clear message, and leaves no half-written files."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_vit import TINY
from torch import nn

import sidecache as sc
from extract.backbones.backbone import TimmBackbone

Attempt = Callable[..., tuple[int, str]]


@pytest.fixture
def pipeline(image_folder: Path, tmp_path: Path) -> Path:
    document = {
        "run_dir": "run",
        "data": {"source": "folder", "root": str(image_folder), "val_fraction": 0.25},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
        "store": {"path": "cache.zarr", "dtype": "float32", "shard_samples": 5},
        "train": {"epochs": 1, "batch_size": 8, "seeds": [0]},
        "methods": ["linear_probe"],
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "pipeline.yaml"


@pytest.fixture
def attempt(pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attempt:
    """Run a command on the pipeline with overrides: (exit status, standard error)."""

    def run(*overrides: str, command: str = "run") -> tuple[int, str]:
        capsys.readouterr()
        options = [part for override in overrides for part in ("-o", override)]
        monkeypatch.setattr(sys, "argv", ["sidecache", command, str(pipeline), *options])
        try:
            sc.main()
        except SystemExit as done:
            _, err = capsys.readouterr()
            assert "Traceback" not in err
            return int(done.code or 0), err
        return 0, capsys.readouterr().err

    return run


def nothing_was_written(folder: Path) -> bool:
    """Neither a store nor results."""
    return not (folder / "cache.zarr" / "zarr.json").exists() and not (folder / "run" / "results.json").exists()


def nothing_counts(folder: Path) -> bool:
    """A store may exist, but none of its shards is committed, and there are no results."""
    store = sc.open_store(folder / "cache.zarr")
    missing = {split: len(store.missing_shards(split)) for split in store.splits}
    return missing == {"train": 5, "test": 3} and not (folder / "run" / "results.json").exists()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# The configuration and the data


def test_a_missing_configuration(attempt: Attempt, pipeline: Path) -> None:
    pipeline.unlink()
    assert attempt() == (2, f"sidecache: cannot read {pipeline}: No such file or directory\n")


def test_an_unknown_key(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt("store.typ=int8")
    assert status == 2
    assert err.startswith("sidecache: store.typ: unknown key; legal keys here: path, preset, layers, tokens, dtype")
    assert nothing_was_written(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_missing_folder(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt("data.root=nowhere")
    assert status == 2
    assert f"data.root {tmp_path / 'nowhere'} does not exist; check the path" in err
    assert nothing_was_written(tmp_path)


def test_an_empty_class(attempt: Attempt, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "yellow").mkdir()
    status, err = attempt()
    assert status == 2
    assert f"the class folder {image_folder / 'train' / 'yellow'} holds no images; fill it or remove it" in err
    assert nothing_was_written(tmp_path)


def test_one_class_only(attempt: Attempt, image_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("green", "red"):
            shutil.rmtree(image_folder / split / name)
    status, err = attempt()
    assert status == 2
    assert "has only one class, 'blue'; a classifier requires at least two" in err
    assert nothing_was_written(tmp_path)


def test_a_class_of_the_test_split_that_training_lacks(attempt: Attempt, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "test" / "red").rename(image_folder / "test" / "rust")
    status, err = attempt()
    assert status == 2
    assert "the test split of images has classes that train lacks: rust" in err
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize("damage", [cut, lambda file: file.write_text("no image"), lambda file: file.write_bytes(b"")])
def test_a_sample_that_cannot_be_decoded(
    attempt: Attempt, image_folder: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    file = image_folder / "train" / "green" / "3.jpg"
    Image.effect_noise((40, 32), 60).save(file)
    damage(file)
    status, err = attempt()
    assert status == 2
    assert err.startswith("sidecache: sample 'train/green/3.jpg' cannot be decoded: ")
    assert "data.on_error: skip" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "results.json").exists()
    assert attempt("data.on_error=skip")[0] == 0
    assert list(sc.open_store(tmp_path / "cache.zarr").skipped("train")) == ["train/green/3.jpg"]


@pytest.mark.parametrize("command", ["run", "extract"])
def test_a_validation_share_that_leaves_no_sample(attempt: Attempt, tmp_path: Path, command: str) -> None:
    for fraction, left in (("0.01", "leaves 24 to train on and 0 to validate on"), ("0.99", "leaves 0 to train on")):
        for source in ("auto", "online") if command == "run" else ("auto",):
            status, err = attempt(f"data.val_fraction={fraction}", f"train.feature_source={source}", command=command)
            assert status == 2
            assert f"val_fraction {fraction} of 24 training samples {left}" in err
            assert nothing_was_written(tmp_path)


# Values


def weights_with(backbone: TimmBackbone, path: Path, *values: float) -> Path:
    """Weights with other values in one bias of the first blocks."""
    state = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    for block, value in enumerate(values):
        state[f"blocks.{block}.mlp.fc2.bias"][7] = value
    save_file(state, path)
    return path


def test_a_feature_that_is_not_finite(
    attempt: Attempt, tiny_backbone: TimmBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "extract.backbones.weights.require_fit", lambda state, model: None
    )  # else such weights are refused
    weights_with(tiny_backbone, tmp_path / "nan.safetensors", 0.0, float("nan"))
    for dtype in ("float32", "int8"):
        status, err = attempt("backbone.weights=nan.safetensors", f"store.dtype={dtype}", f"store.path={dtype}.zarr")
        assert status == 1, err
        assert err.count("\n") == 1
        assert "nan" in err
        assert "layer 1" in err
        assert not (tmp_path / "run" / "results.json").exists()


def test_an_overflow_of_float16(attempt: Attempt, tiny_backbone: TimmBackbone, tmp_path: Path) -> None:
    weights_with(
        tiny_backbone, tmp_path / "huge.safetensors", 6e4, 6e4
    )  # each is a legal float16, but their sum is not
    status, err = attempt("backbone.weights=huge.safetensors", "store.dtype=float16")
    assert status == 1
    assert "layer 1, token 0, channel 7: the value 1" in err
    assert "cannot be stored as float16; choose store.dtype bfloat16" in err
    assert "sample 'train/blue/0.png'" in err
    assert err.count("\n") == 1
    assert nothing_counts(tmp_path)
    assert attempt("backbone.weights=huge.safetensors", "store.dtype=bfloat16", "store.path=b.zarr")[0] == 0


# The backbone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("store.layers=[1, 3]", "layers [3] do not exist: this backbone has 3, numbered 0 to 2"),
        ("store.tokens={pool: 3}", "store.tokens pools by 3, which does not divide the grid (4, 4); legal: [2, 4]"),
        ("backbone.name=vit_tiny_patch16_242", "is no timm model; near ones: vit_tiny_patch16_224"),
        ("backbone.name=resnet18", "timm cannot build 'resnet18' with model_kwargs"),
        (
            "backbone.weights=nowhere.pth",
            "nowhere.pth': there is no such file or folder; give backbone.weights a local",
        ),
        ("backbone.model_kwargs={depht: 3}", "got an unexpected keyword argument 'depht'"),
        ("extract.device=abacus", "device 'abacus' cannot be used here; legal: auto, cpu"),
        ("extract.device=meta", "device 'meta' cannot be used here; legal: auto, cpu"),
    ],
)
def test_a_backbone_that_cannot_give_what_is_asked_for(
    attempt: Attempt, tmp_path: Path, override: str, message: str
) -> None:
    status, err = attempt(override)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert nothing_was_written(tmp_path)


def test_an_option_that_the_stored_tokens_cannot_serve(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt("store.tokens=cls", "methods=[{name: linear_probe, pool: mean}]")
    assert status == 2
    assert "pool 'mean' is not available: it needs tokens that are not there" in err
    assert "legal: cls, flatten, backbone" in err
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_layer_that_is_not_stored(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt("store.layers=[1, 2]", "methods=[{name: losa, layers: [0, 2]}]")
    assert status == 2
    assert "layers [0] are not in the features, which hold [1, 2]" in err
    assert not (tmp_path / "run" / "results.json").exists()


# A store made from something else


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("backbone.name=vit_small_patch16_224", "provenance.backbone"),
        ("backbone.image_size=40", "provenance.image_size"),
        ("backbone.weights=other.safetensors", "provenance.weights_digest"),
        ("backbone.weights=folder", "provenance.preprocessing_digest"),
        ("store.dtype=float16", "provenance.dtype"),
        ("store.tokens=cls", "provenance.tokens"),
        ("extract.precision=bfloat16", "provenance.precision"),
    ],
)
def test_a_store_of_something_else(
    attempt: Attempt, tiny_backbone: TimmBackbone, tmp_path: Path, override: str, field: str
) -> None:
    if field == "provenance.weights_digest":
        weights_with(tiny_backbone, tmp_path / "other.safetensors", 0.5)
    if field == "provenance.preprocessing_digest":
        save_hub_folder(tiny_backbone.module, tmp_path / "folder", mean=[0.1, 0.2, 0.3])
    assert attempt(command="extract")[0] == 0
    before = content_of(tmp_path / "cache.zarr")
    status, err = attempt(override)
    assert status == 2
    assert "cache.zarr/ was made from something else" in err
    assert f"\n  {field}: stored " in err
    assert "choose another store.path" in err
    assert content_of(tmp_path / "cache.zarr") == before
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_store_of_samples_that_are_gone(attempt: Attempt, image_folder: Path, tmp_path: Path) -> None:
    assert attempt(command="extract")[0] == 0
    before = content_of(tmp_path / "cache.zarr")
    shutil.copytree(image_folder, tmp_path / "renamed")
    (tmp_path / "renamed/train/red/0.png").rename(tmp_path / "renamed/train/red/99.png")
    status, err = attempt("data.root=renamed")
    assert status == 2
    assert "cache.zarr/ holds:\n  train: 1 ('train/red/0.png') gone\nOnly new samples of its classes" in err
    assert content_of(tmp_path / "cache.zarr") == before
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_store_without_the_layers_that_are_wanted(attempt: Attempt, tmp_path: Path) -> None:
    assert attempt("store.layers=[1, 2]", command="extract")[0] == 0
    before = content_of(tmp_path / "cache.zarr")
    status, err = attempt(command="train")
    assert status == 2
    assert "\n  store.layers: stored [1, 2], wanted [0, 1, 2]" in err
    assert content_of(tmp_path / "cache.zarr") == before


def save_hub_folder(module: nn.Module, folder: Path, **pretrained_cfg: Any) -> None:
    folder.mkdir()
    save_file(dict(module.state_dict()), folder / "model.safetensors")
    card = {"architecture": "vit_tiny_patch16_224", "model_args": TINY, "pretrained_cfg": pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(card))


def test_an_image_that_was_replaced_by_another_of_the_same_size(
    attempt: Attempt, image_folder: Path, tmp_path: Path
) -> None:
    file = image_folder / "train" / "red" / "5.bmp"
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(file)
    size = file.stat().st_size
    assert attempt(command="extract")[0] == 0
    Image.fromarray(np.full((32, 40, 3), 9, np.uint8)).save(file)
    assert file.stat().st_size == size
    status, err = attempt()
    assert status == 2
    assert "cache.zarr/ holds:\n  train: 1 ('train/red/5.bmp') changed\n" in err


# Paths


def test_a_run_dir_below_a_file(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt("run_dir=pipeline.yaml/run")
    assert (status, err) == (
        2,
        f"sidecache: run_dir {tmp_path}/pipeline.yaml/run cannot be made (Not a directory); choose another one\n",
    )
    assert nothing_was_written(tmp_path)


def test_a_store_below_a_file(attempt: Attempt, pipeline: Path) -> None:
    before = pipeline.read_bytes()
    status, err = attempt("store.path=pipeline.yaml/cache.zarr")
    assert status in (1, 2)
    assert "pipeline.yaml/cache.zarr" in err
    assert err.count("\n") == 1
    assert pipeline.read_bytes() == before


def test_a_store_path_where_something_else_lies(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "cache.zarr").mkdir()
    (tmp_path / "cache.zarr" / "zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}}'
    )
    before = content_of(tmp_path / "cache.zarr")
    status, err = attempt()
    assert status == 2
    assert "choose another store.path" in err
    assert content_of(tmp_path / "cache.zarr") == before


def test_training_that_diverges(attempt: Attempt, tmp_path: Path) -> None:
    status, err = attempt(
        "methods=[losa]", "train.lr=1.0e+30", "train.epochs=4", "train.optimizer=sgd", "train.warmup=0.0"
    )
    assert status == 1
    assert err.splitlines()[-1].startswith("sidecache: ")
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
