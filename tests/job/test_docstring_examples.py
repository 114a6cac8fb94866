"""The examples in the docstrings of the public functions run, in a folder with a store and an adaptor of digits."""

import doctest
import importlib
from pathlib import Path

import pytest
from tiny_vit import TINY

import sidecache as sc

MODULES = ("adapt.adaptors.files", "adapt.create", "store.layout", "store.reader")


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small job on digits was run."""
    folder = tmp_path_factory.mktemp("digits")
    document = {
        "run_dir": str(folder / "runs/digits"),
        "data": {"source": "digits"},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": dict(TINY)},
        "store": {"path": str(folder / "runs/digits/cache.zarr")},
        "train": {"epochs": 1, "seeds": [0]},
        "methods": [{"name": "losa", "rank": 4}],
    }
    sc.run(sc.load_config(document))
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(module: str, digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits_folder)
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
