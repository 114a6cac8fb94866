"""A study file: its parts are ordinary jobs with names, run directories and stores of their own."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.study import Study, load_job, load_study
from store.errors import UserError

DATASETS: dict[str, Any] = {"digits": {"source": "digits"}, "roofs": {"source": "folder", "root": "images/roofs"}}
BACKBONES: dict[str, Any] = {"random": {"weights": "random"}, "own.v2": {"name": "vivit", "weights": "own.pt"}}
ONE: dict[str, Any] = {"datasets": DATASETS, "backbone": {"weights": "random"}}
BOTH: dict[str, Any] = {"datasets": DATASETS, "backbones": BACKBONES}


def refuse(document: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_study(document, overrides)
    return str(refused.value)


def write(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "study.yaml"


# Parts


def test_every_combination_is_a_part_with_its_own_run_dir_and_store(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, BOTH | {"run_dir": "runs"}))
    assert [part.name for part in study.parts] == ["digits/random", "digits/own.v2", "roofs/random", "roofs/own.v2"]
    assert study.run_dir == tmp_path / "runs"
    for part in study.parts:
        assert part.config.run_dir == study.run_dir / part.name
        assert part.config.store.path == str(study.run_dir / part.name / "cache.zarr")
        assert (part.config.report_as.dataset, part.config.report_as.backbone) == (part.dataset, part.backbone)
    last = study.parts[-1].config
    assert (last.data.root, last.backbone.weights) == (tmp_path / "images/roofs", str(tmp_path / "own.pt"))


def test_a_section_that_is_no_map_adds_no_folder_and_no_name() -> None:
    study = load_study(ONE)
    assert [(part.name, part.backbone, part.config.report_as.backbone) for part in study.parts] == [
        ("digits", None, None),
        ("roofs", None, None),
    ]
    several = load_study({"backbones": BACKBONES})
    assert [(part.name, part.config.data.source) for part in several.parts] == [
        ("random", "digits"),
        ("own.v2", "digits"),
    ]


def test_a_part_is_the_job_that_its_own_file_would_give(tmp_path: Path) -> None:
    shared = {"train": {"epochs": 3}, "methods": ["losa"], "store": {"dtype": "int8"}}
    part = load_study(write(tmp_path, ONE | shared)).parts[1]
    written = part.config.as_written()
    assert load_config(written) == part.config
    alone = {"data": DATASETS["roofs"], "backbone": ONE["backbone"], "run_dir": written["run_dir"], **shared}
    alone["store"] = {"dtype": "int8", "path": written["store"]["path"]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(alone | {"report_as": {"dataset": "roofs"}}))
    assert load_config(tmp_path / "pipeline.yaml") == part.config


def test_variables_stay_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "/secret")
    document = {
        "datasets": {"a": {"source": "folder", "root": "${SECRET}/a"}},
        "backbone": {"weights": "${SECRET}/w.pt"},
        "run_dir": "${SECRET}/runs",
        "store": {"path": "${SECRET}/{dataset}.zarr"},
    }
    study = load_study(document)
    (part,) = study.parts
    assert (study.run_dir, part.config.run_dir) == (Path("/secret/runs"), Path("/secret/runs/a"))
    assert part.config.store.path == "/secret/a.zarr"
    assert "/secret" not in str(part.config.as_written()) + str(study.as_written)
    assert part.config.as_written()["run_dir"] == "${SECRET}/runs/a"


def test_overrides_reach_one_data_set_or_all_parts() -> None:
    study = load_study(ONE, ["datasets.roofs.val_fraction=0.1", "datasets.roofs.root=a b #c", "train.epochs=3"])
    digits, roofs = (part.config for part in study.parts)
    assert (digits.data.val_fraction, roofs.data.val_fraction) == (0.2, 0.1)
    assert roofs.data.root == Path.cwd() / "a b #c"
    assert (digits.train.epochs, roofs.train.epochs) == (3, 3)


# Stores


def test_the_path_of_a_store_may_name_data_set_and_backbone() -> None:
    study = load_study(BOTH, ["store.path=s3://bucket/{backbone}-{dataset}.zarr"])
    assert study.parts[1].config.store.path == "s3://bucket/own.v2-digits.zarr"


@pytest.mark.parametrize(
    ("document", "path", "legal"),
    [(ONE, "x.zarr", "{dataset}"), (BOTH, "x.zarr", "{dataset} and {backbone}"), (BOTH, "{dataset}", "{backbone}")],
)
def test_parts_that_would_share_a_store_are_refused(document: dict[str, Any], path: str, legal: str) -> None:
    message = refuse(document, f"store.path={path}")
    assert message.startswith(f"store.path: given {path!r}; digits")
    assert "would share this store" in message
    assert legal in message


def test_an_unknown_placeholder_is_refused() -> None:
    message = "store.path: given '{split}.zarr'; {split} is unknown; legal in this study: {dataset}"
    assert refuse(ONE, "store.path={split}.zarr") == message
    assert "{backbone} is unknown; legal in this study: {dataset}" in refuse(ONE, "store.path={dataset}-{backbone}")


# Names


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", ".hidden", "-o", "a b", "ä", "a\n", "x" * 101, "c:"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    assert "legal: at most 100 letters, digits" in refuse(ONE | {"datasets": {name: {}}})


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True))
def test_a_legal_name_is_one_folder_below_the_run_dir(name: str) -> None:
    try:
        (part,) = load_study(ONE | {"datasets": {name: {}}, "run_dir": "/runs"}).parts
    except UserError as error:
        assert "a file of the run directory has this name" in str(error)  # noqa: PT017
    else:
        assert part.config.run_dir.parent == Path("/runs")
        assert part.config.run_dir.name == name


def test_names_that_differ_in_case_alone_are_refused() -> None:
    message = refuse({"backbones": {"vit": {"weights": "random"}, "ViT": {"weights": "random"}}})
    assert message == "backbones: given the name 'ViT' beside 'vit'; legal: names that differ in more than case"


@pytest.mark.parametrize("name", ["study.json", "Results.CSV"])
def test_a_name_of_a_file_of_the_study_is_refused(name: str) -> None:
    assert "a file of the run directory has this name" in refuse(ONE | {"datasets": {name: {}}})


# Messages


def test_mistakes_of_all_sections_are_reported_at_once_by_their_keys() -> None:
    lines = refuse(ONE, "datasets.roofs.val_fration=0.1", "train.epcohs=3", "dataset.a=1").splitlines()
    assert lines[0].startswith("datasets.roofs.val_fration: unknown key; legal keys here: source, root, ")
    assert lines[1].startswith("train.epcohs: unknown key; legal keys here: feature_source, ")
    assert lines[2].startswith("dataset: unknown key; legal keys here: name, run_dir, data, ")
    assert lines[2].endswith("datasets, backbones; did you mean 'datasets'?")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"datasets": {}}, "datasets: given {}; legal: {NAME: a section like `data:`}, with at least one name"),
        ({"datasets": ["a"]}, "datasets: given ['a']; legal: {NAME: a section like `data:`}"),
        ({"datasets": {"a": 3}}, "datasets.a: given 3; legal: a section with the keys source, root"),
        (
            {"datasets": {"a": {"source": "digts"}}},
            "datasets.a.source: given 'digts'; legal: digits, drawn:TASK, folder, ",
        ),
        ({"datasets": {"a": {"video": {}}}}, "datasets.a: data.video is given, but data.source is digits"),
        ({"data": {}}, "data and datasets are both given; keep one"),
        ({"backbones": {"b": {}}}, "backbones.b.weights: is missing; legal: pretrained, random, "),
        ({"backbones": BACKBONES}, "backbone and backbones are both given; keep one"),
        ({"methods": ["lsoa"]}, "methods: there is no method 'lsoa'; legal: linear_probe, "),
        ({"run_dir": 3}, "run_dir: given 3; legal: the path of a folder"),
        ({"store": 3}, "store: given 3; legal: a section with the keys path, preset, layers"),
        ({"datasets": {f"d{k}": {} for k in range(1001)}}, "there are 1,001 combinations; legal: at most 1,000"),
    ],
)
def test_a_mistake_names_key_and_legal_values(document: dict[str, Any], message: str) -> None:
    assert message in refuse(ONE | document)


def test_a_study_and_a_job_are_told_apart() -> None:
    assert isinstance(load_job(ONE), Study)
    assert isinstance(load_job({"backbone": {"weights": "random"}}), Config)
    with pytest.raises(UserError, match=r"^this configuration is a study of several jobs.*load_study"):
        load_config(ONE)
    assert "this is the configuration of a single job" in refuse({"backbone": {"weights": "random"}})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("{dataset}"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "A", "root", "path"]), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*Config.model_fields, "datasets", "backbones"]), VALUES, max_size=3))
def test_any_study_is_loaded_or_refused_with_a_message(sections: dict[str, Any]) -> None:
    try:
        study = load_job(ONE | sections)
    except UserError as error:
        assert 0 < len(str(error)) < 10_000  # noqa: PT017
    else:
        assert isinstance(study, Study)
        assert study.parts
