"""Examples in the documentation run, and its tables are those of the result files."""

import json
import re
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import yaml

from adapt.config.load_config import load_config
from adapt.config.study import Study, load_job, load_study
from adapt.methods.registry import METHODS, find_method
from benchmarks.tables import TABLES

ROOT = Path(__file__).parents[2]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        exec(block, scope)
    assert [row.method for row in scope["rows"]] == ["linear_probe", "losa"]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "extract").symlink_to(ROOT / "extract")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for cell in json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "it is kept without outputs"
            exec("".join(cell["source"]), scope)
    printed = capsys.readouterr().out
    assert "(3, 65, 128)" in printed
    assert "test samples are wrong" in printed
    assert (tmp_path / "runs/first-steps/report.html").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_parse_with_data_in_any_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECACHE_DATA", "/data")
    monkeypatch.setenv("CIFAR10_FOLDER", "/data/cifar10")
    monkeypatch.setenv("IMAGES", "/data/images")
    job = load_job(path)
    methods = (job.parts[0].config if isinstance(job, Study) else job).parsed_methods()
    assert {"linear_probe", "losa"} <= {method.name for method in methods}
    # in the study of end-to-end methods only these are of equal budgets: the others take seconds
    compared = [method for method in methods if path.name != "rivals.yaml" or find_method(method.name).trains_backbone]
    assert len({len(method.trials) for method in compared}) == 1, "the budgets are equal"
    trained = [method for method in compared if method.name != "linear_probe"]  # a probe may read all patches
    assert {trial.options.pool for method in trained for trial in method.trials} == {"auto"}, "so is the head"


def test_the_study_of_the_documentation_has_the_parts_that_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECACHE_DATA", "/data")
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    study = load_study(yaml.safe_load(block))
    assert [part.name for part in study.parts] == ["rsscn7/tiny", "rsscn7/base", "trashnet/tiny", "trashnet/base"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "methods").glob("*.yaml")), ids=lambda path: path.name)
def test_tables_of_all_methods_give_each_the_same_budget(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECACHE_DATA", "/data")
    methods = load_config(path).parsed_methods()
    assert {method.name for method in methods} == set(METHODS) - {"intrinsic"}  # used for measurements only
    assert {len(method.trials) for method in methods} == {15}
    assert len({(method.epochs, method.batch_size) for method in methods}) == 1


def test_the_default_job_parses_and_searches_its_probe_over_twenty_points() -> None:
    config = load_config(ROOT / "pipeline.yaml")
    probe = next(method for method in config.parsed_methods() if method.name == "linear_probe")
    assert len(probe.trials) >= 20
    assert {"cls", "mean"} <= {trial.options.pool for trial in probe.trials}
    assert Path(config.backbone.weights).stat().st_size < 4 * 2**20 or Path(config.backbone.weights).is_dir()


def test_the_embedded_weights_are_small() -> None:
    assert (ROOT / "extract" / "fractal_vit" / "model.safetensors").stat().st_size <= 4 * 10**6


def test_every_dependency_is_explained() -> None:
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in listed}  # type: ignore[index]
    assert named
    assert [name for name in sorted(named) if f"| {name} |" not in explained and name != "sidecache"] == []


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_tables_of_performance_are_those_of_the_results(make: Callable[[], str]) -> None:
    assert make() in (ROOT / "docs" / "performance.md").read_text()
