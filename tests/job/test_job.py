"""The whole job, through the public Python functions."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.feature_set import open_features
from adapt.job.inputs import Inputs
from extract.backbones import backbone
from extract.sources import open_source
from store.address import store_url
from store.arrays import LOG
from store.kvstore import KeyValueStore

MakeConfig = Callable[..., Config]


def test_a_second_run_extracts_and_trains_nothing(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    first = sc.run(config)
    capsys.readouterr()
    assert sc.run(config) == first
    logged = capsys.readouterr().err
    assert "nothing to extract" in logged
    assert logged.count("finished before") == 2


def test_a_run_leaves_results_report_adaptors_and_configuration(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    sc.run(config)
    left = {path.name for path in config.run_dir.iterdir()}
    assert {"results.json", "results.csv", "report.html", "config.yaml", "adaptors"} <= left
    suffixes = sorted(path.suffix for path in (config.run_dir / "adaptors").iterdir())
    assert suffixes == [".json", ".json", ".safetensors", ".safetensors"]
    assert not list((config.run_dir / "checkpoints").iterdir())


def test_points_beyond_the_edge_of_a_grid_are_counted(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("methods=[linear_probe]", "sweep={weight_decay: [1.0, 10.0, 100.0]}")
    sc.run(config)
    (scores,) = (config.run_dir / "search").iterdir()
    n_tried = len(json.loads(scores.read_text())["points"])
    assert n_tried > 3
    assert f"among {n_tried} on validation" in capsys.readouterr().err


def test_samples_that_went_forward_again_for_added_layers_count_again(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[linear_probe]")
    sc.extract(tiny_config("store.layers={last: 1}"))
    sc.extract(config)
    folder = KeyValueStore(store_url(config.store.path))
    log = folder.read_group(LOG) or {}
    seconds, costs = log["forward_seconds"], open_features(config, Inputs(config), print).costs
    assert costs.forward_seconds_per_sample == seconds / (2 * (24 + 12))
    del log["forward_samples"]  # as in stores that older versions wrote
    folder.write_group(LOG, log)
    costs = open_features(config, Inputs(config), print).costs
    assert costs.forward_seconds_per_sample == seconds / (24 + 12)


@pytest.mark.parametrize("command", ["run", "intrinsic"])
def test_a_command_lists_the_samples_and_loads_the_weights_once(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Also if an end-to-end method trains on the images after their extraction."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    list_folder, load_model = open_source.LISTERS["folder"], backbone.load_model
    monkeypatch.setitem(open_source.LISTERS, "folder", counted("listings", list_folder))
    monkeypatch.setattr(backbone, "load_model", counted("loads", load_model))
    config = tiny_config("methods=[linear_probe, bitfit]", "train.epochs=1")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["sidecache", command, str(tmp_path / "pipeline.yaml")])
    sc.main()
    assert calls == {"listings": 1, "loads": 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_every_stored_format_trains(tiny_config: MakeConfig, dtype: str) -> None:
    rows = sc.run(tiny_config(f"store.dtype={dtype}"))
    assert [row.method for row in rows] == ["linear_probe", "losa"]
    assert all(row.top1 is not None and row.store_bytes for row in rows)


def test_lines_name_what_a_search_chose_and_the_scores_of_every_seed(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = "methods=[{name: losa, rank: 2, token_rank: 2, sweep: {lr: [0.01, 0.001]}}]"
    rows = sc.run(tiny_config(swept, "train.seeds=[0, 1]", "train.class_weights=balanced"))
    lines = capsys.readouterr().err.splitlines()
    assert f"losa: chose lr={rows[0].lr:g} among 2 on validation" in lines
    for row in rows:
        expected = f"{row.mean_class_accuracy:.2f} on test, {row.val_score:.2f} on validation"
        assert f"losa seed {row.seed}: {expected}" in lines
