"""pipeline.yaml: legal values, error messages, and which of two values has precedence."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.methods.registry import METHODS
from extract.config import ClipConfig
from store.config import PRESETS, TOKENS_HELP, Every, Last, Pool, Spread
from store.errors import UserError

MINIMAL: dict[str, Any] = {"backbone": {"weights": "random"}}


def load(*overrides: str, **sections: Any) -> Config:
    return load_config(MINIMAL | sections, overrides)


def refuse(*overrides: str, **sections: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(*overrides, **sections)
    return str(refused.value)


def load_text(folder: Path, text: str) -> Config:
    (folder / "pipeline.yaml").write_text(text)
    return load_config(folder / "pipeline.yaml")


# Keys


def test_the_documentation_has_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    documented = yaml.safe_load(block)
    defaults = Config.model_validate(MINIMAL).model_dump(mode="json")
    defaults["data"]["video"] = ClipConfig().model_dump()
    defaults["backbone"]["weights"] = documented["backbone"]["weights"]  # required
    assert documented.keys() == defaults.keys()
    assert load(methods=documented.pop("methods")).parsed_methods()
    assert documented == {key: defaults[key] for key in documented}


@pytest.mark.parametrize(
    ("section", "value", "key", "legal"),
    [
        ("epochs", 3, "epochs", "name, run_dir, data, backbone, store, extract, train, methods, sweep, search"),
        ("a.b", 3, "a.b", "name, run_dir, data"),
        ("data", {"rot": "x"}, "data.rot", "source, root, test_split"),
        ("backbone", {"weights": "random", "size": 3}, "backbone.size", "name, weights, image_size, model_kwargs"),
        ("store", {"typ": "int8"}, "store.typ", "path, preset, layers, tokens, dtype, compressor, shard_samples"),
        ("extract", {"worker": 1}, "extract.worker", "batch_size, precision, device, workers, scheduler"),
        ("train", {"a.b": 1}, "train.a.b", "feature_source, epochs"),
    ],
)
def test_an_unknown_key_is_named_with_the_legal_ones(section: str, value: Any, key: str, legal: str) -> None:
    message = refuse(**{section: value})
    assert message.startswith(f"{key}: unknown key; legal keys here: ")
    assert legal in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "value", "hint"),
    [
        ("train", {"epoch": 3}, "; did you mean 'epochs'?"),
        ("Train", {}, "; did you mean 'train'?"),
        ("epochs", 3, "; did you mean train.epochs or search.epochs?"),
        ("train", {"val_fraction": 0.1}, "; did you mean data.val_fraction?"),
        ("store", {"qqq": 1}, "views"),
    ],
)
def test_a_key_that_is_near_or_in_another_section_is_suggested(section: str, value: Any, hint: str) -> None:
    assert ("did you mean" in refuse(**{section: value})) == ("?" in hint)
    assert "?" not in hint or refuse(**{section: value}).endswith(hint)


def test_an_unknown_option_of_a_method_is_named_with_the_legal_ones() -> None:
    message = refuse(methods=[{"name": "losa", "rnk": 8}])
    assert message.startswith("methods: losa: rnk: unknown key; legal keys here: rank, token_rank, start, ")
    assert message.endswith("name, epochs, batch_size, head_lr, lr, weight_decay, sweep; did you mean 'rank'?")
    assert refuse(methods=[{"name": "losa", "sweep": {"rnk": [8]}}]).startswith("methods: losa: rnk: unknown key")


def test_an_unknown_method_is_named_with_the_legal_ones() -> None:
    message = f"methods: there is no method 'lara'; legal: {', '.join(METHODS)}; did you mean 'lora'"
    assert refuse(methods=["lara"]).startswith(message)


def test_a_sweep_that_reaches_no_method_is_refused() -> None:
    assert "no method of `methods:` has an option 'rnk'; legal: add, dropout, factorised, layers, lr" in refuse(
        sweep={"rnk": [8]}
    )
    assert "no method of `methods:` has an option 'rank'" in refuse(methods=["linear_probe"], sweep={"rank": [8]})


def test_several_mistakes_are_reported_at_once() -> None:
    message = refuse(train={"epochs": 0, "batch_size": "big"}, store={"dtype": "int2"})
    assert [line.split(":")[0] for line in message.splitlines()] == ["store.dtype", "train.epochs", "train.batch_size"]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^backbone: is missing; legal: a section with the keys name, weights"):
        load_config({})
    assert "backbone.weights: is missing; legal: pretrained, random, hf-hub:ORG/NAME" in refuse(backbone={})


@pytest.mark.parametrize("given", [None, "text", 3, ["a"]])
def test_a_value_in_place_of_a_section_says_what_belongs_there(given: Any) -> None:
    assert refuse(data=given).startswith(f"data: given {given!r}; legal: a section with the keys source, root")


# Values


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("train", {"epochs": 0}, "train.epochs: given 0; input should be greater than or equal to 1"),
        ("train", {"epochs": 2.5}, "train.epochs: given 2.5; input should be a valid integer"),
        ("train", {"epochs": True}, "train.epochs: given True; input should be a valid integer"),
        ("train", {"epochs": "3"}, "train.epochs: given '3'; input should be a valid integer"),
        ("train", {"lr": float("nan")}, "train.lr: given nan; input should be a finite number"),
        ("train", {"lr": float("inf")}, "train.lr: given inf; input should be a finite number"),
        ("train", {"lr": -1.0}, "train.lr: given -1.0; input should be greater than 0"),
        ("train", {"lr": 0}, "train.lr: given 0; input should be greater than 0"),
        ("train", {"weight_decay": -0.1}, "train.weight_decay: given -0.1; input should be greater than or equal to 0"),
        ("train", {"class_weights": "x"}, "train.class_weights: given 'x'; legal: balanced or null"),
        ("train", {"feature_source": "x"}, "'auto', 'resident', 'streamed' or 'online'"),
        ("train", {"warmup": 1.0}, "train.warmup: given 1.0; input should be less than 1"),
        ("data", {"source": "csv", "video": {"frames": 8}}, "data.video is given, but data.source is csv; use video_"),
        ("data", {"val_fraction": 0.0}, "data.val_fraction: given 0.0; input should be greater than 0"),
        ("data", {"val_fraction": float("nan")}, "data.val_fraction: given nan"),
        (
            "data",
            {"source": "imagenet"},
            "legal: digits, drawn:TASK, folder, csv, parquet, tars, torchvision:NAME, video_folder or video_csv",
        ),
        ("data", {"on_error": "ignore"}, "data.on_error: given 'ignore'; input should be 'fail' or 'skip'"),
        ("data", {"root": 5}, "data.root: given 5; legal: a path"),
        ("data", {"root": "a\0b"}, "data.root: given 'a\\x00b'; legal: a path"),
        ("store", {"dtype": "int2"}, "given 'int2'; input should be 'float32', 'float16', 'bfloat16', 'int8' or"),
        ("store", {"path": ""}, "store.path: given ''; legal: a path"),
        ("extract", {"batch_size": 0}, "extract.batch_size: given 0; legal: auto or a positive whole number"),
        ("run_dir", None, "run_dir: given None; legal: the path of a folder"),
        ("name", 5, "name: given 5; input should be a valid string"),
        ("methods", [], "methods: given []; legal: a list of method names"),
        ("methods", "losa", "methods: given 'losa'; legal: a list of method names"),
        ("methods", [3], "methods: given 3; legal: a list of method names"),
        ("methods", [{"rank": 8}], "methods: {'rank': 8} has no name; write it as {name: losa, rank: 8}"),
        ("methods", [{"name": "losa", "rank": 0}], "methods: losa: rank: given 0; input should be greater than"),
        ("methods", [{"name": "losa", "epochs": 0}], "methods: losa: epochs: given 0; input should be greater than"),
        ("methods", [{"name": "losa", "lr": float("nan")}], "methods: losa: lr: given nan; input should be a finite"),
        (
            "methods",
            [{"name": "losa", "lr": "fast"}],
            "methods: losa: lr: given 'fast'; input should be a valid number",
        ),
        ("methods", [{"name": "losa", "sweep": {"lr": [0.1, -1]}}], "methods: losa: lr: given -1; input should be"),
        ("methods", [{"name": "losa", "sweep": {"lr": []}}], "methods: losa: sweep: given {'lr': []}; legal: {option"),
        ("methods", [{"name": "losa", "sweep": [1]}], "methods: losa: sweep: given [1]; legal: {option: [values]}"),
        ("sweep", {"rank": []}, "sweep.rank: given []; legal: {option: [values]}"),
        ("sweep", {"rank": 8}, "sweep.rank: given 8; legal: {option: [values]}"),
    ],
)
def test_an_illegal_value_is_refused_in_one_line(section: str, value: Any, message: str) -> None:
    refused = refuse(**{section: value})
    assert message in refused
    assert "\n" not in refused


@pytest.mark.parametrize(
    "layers", ["some", 3, [1.5], ["1"], {"every": 0}, {"every": 2, "last": 2}, {"last": 0}, {"spread": 0}]
)
def test_illegal_layers_give_one_message(layers: Any) -> None:
    legal = "legal: all, a list such as [3, 7, 11], {every: k}, {spread: n} or {last: n}"
    assert refuse(store={"layers": layers}) == f"store.layers: given {layers!r}; {legal}"
    for method, of_method in (("linear_probe", legal), ("losa", legal.replace("legal: ", "legal: auto, "))):
        message = refuse(methods=[{"name": method, "layers": layers}])
        assert message == f"methods: {method}: layers: given {layers!r}; {of_method}"


@pytest.mark.parametrize("tokens", ["patches", 3, {"pool": 1}, {"pool": "x"}, [2], {"grid": 0}, {"grid": 8, "pool": 2}])
def test_illegal_tokens_give_one_message(tokens: Any) -> None:
    assert refuse(store={"tokens": tokens}) == f"store.tokens: given {tokens!r}; legal: {TOKENS_HELP}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stands_for_its_options_and_those_beside_it_take_precedence(preset: str) -> None:
    options = load(f"store.preset={preset}").store
    assert options == load(*(f"store.{name}={json.dumps(value)}" for name, value in PRESETS[preset].items())).store
    assert load(f"store.preset={preset}", "store.dtype=bfloat16").store == options.model_copy(
        update={"dtype": "bfloat16"}
    )
    assert options.preset is None, "a resolved configuration has the options alone"


def test_a_preset_can_be_replaced_by_another() -> None:
    options = load("store.preset=lean", "store.dtype=float16").store
    assert options.at_preset("grid") == load("store.preset=grid", "store.dtype=float16").store
    assert options.at_preset("grid").at_preset("lean") == options


def test_a_wrong_preset_is_refused() -> None:
    assert refuse(store={"preset": "tiny"}) == (
        "store.preset: given 'tiny'; legal: null, probe, lean, coarse, grid, full or auto"
    )


def test_every_form_of_layers_and_tokens_is_read() -> None:
    assert load("store.layers=[3, 7, 11]").store.layers == [3, 7, 11]
    assert load("store.layers={every: 3}").store.layers == Every(every=3)
    assert load("store.layers={last: 4}").store.layers == Last(last=4)
    assert load("store.layers={spread: 4}").store.layers == Spread(spread=4)
    assert load("store.tokens={grid: 8, time: 2}").store.tokens == Pool(grid=8, time=2)
    assert load("store.tokens={pool: 2}").store.tokens == Pool(pool=2)
    assert load("store.tokens=cls").store.tokens == "cls"


@pytest.mark.parametrize("seeds", [[], [-1], [0, 0], [True], ["3"], [1.0], 3, None, [2**63]])
def test_illegal_seeds_give_one_message(seeds: Any) -> None:
    message = refuse(train={"seeds": seeds})
    assert message.startswith("train.seeds: given ")
    assert message.endswith("; legal: a list of different whole numbers, each at least 0")


def test_seeds_may_be_any_whole_numbers() -> None:
    assert load(train={"seeds": [7, 0, 2**63 - 1]}).train.seeds == (7, 0, 2**63 - 1)


def test_a_huge_value_is_cut_in_the_message() -> None:
    assert len(refuse(train={"epochs": "x" * 10_000})) < 250
    assert len(refuse(train={"lr": 10**400})) < 250
    assert "given a huge int" in refuse(name=10**5000)


@pytest.mark.parametrize(("section", "limit"), [("extract", "shard_seconds"), ("train", "trial_seconds")])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workers=0", "given 0; input should be greater than or equal to 1"),
        ("scheduler=localhost", "legal: null or the address of a dask scheduler, such as tcp://10.0.0.1:8786"),
        ("{limit}=0", "legal: auto or a positive number of seconds"),
    ],
)
def test_workers_and_schedulers_are_checked(section: str, limit: str, override: str, message: str) -> None:
    load(f"{section}.workers=3", f"{section}.scheduler=tls://a:1", f"{section}.{limit}=30.0")
    refused = refuse(f"{section}.{override.format(limit=limit)}")
    assert refused.startswith(f"{section}.")
    assert message in refused


# Overrides and YAML


def test_overrides_take_yaml_values() -> None:
    config = load(
        "train.epochs=5",
        "train.seeds=[4, 5]",
        "store.compressor=null",
        "backbone.model_kwargs={depth: 3}",
        "backbone.model_kwargs.num_heads=2",
        "methods=[linear_probe, {name: losa, rank: 2}]",
        " train . lr =1e-3",
    )
    assert (config.train.epochs, config.train.seeds, config.train.lr) == (5, (4, 5), 0.001)
    assert config.backbone.model_kwargs == {"depth": 3, "num_heads": 2}
    assert config.methods == ["linear_probe", {"name": "losa", "rank": 2}]


def test_a_later_override_wins() -> None:
    assert load("train.epochs=5", "train.epochs=6").train.epochs == 6


@pytest.mark.parametrize("override", ["train.epochs", "=5", ".epochs=5", "train.=5", "train..epochs=5", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    assert refuse(override) == f"-o {override}: write it as -o section.key=value, for example -o train.epochs=5"


def test_an_override_that_is_no_yaml_is_refused() -> None:
    assert refuse("train.seeds=[1").startswith("-o train.seeds=[1 is not valid YAML: ")


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("1E3", 1e3), ("2.5e+1", 25.0), (".5e1", 5.0), ("3", 3)])
def test_exponents_without_a_point_are_numbers(text: str, number: float) -> None:
    assert load(f"train.lr={text}").train.lr == number


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline.yaml is not valid YAML: the key 'epochs' is given twice.*line 2"):
        load_text(tmp_path, "backbone: {weights: random}\ntrain: {epochs: 3, epochs: 4}")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "backbone: {weights: random}\nmethods:\n - &a {name: losa, rank: 8}\n - {<<: *a, token_rank: 2}"
    assert load_text(tmp_path, text).methods[1] == {"name": "losa", "rank": 8, "token_rank": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold sections such as `data:` and `backbone:`, but holds nothing"),
        ("- a", "must hold sections such as `data:` and `backbone:`, but holds list"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
        ('a: !!int ""', "is not valid YAML"),
        ("a: !!bool maybe", "is not valid YAML"),
        ("1: a", "the key 1 is not text"),
        ("a: &a [*a]", "is not valid YAML"),
        ("\x07: 1", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=r"pipeline\.yaml") as refused:
        load_text(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mapping_that_holds_itself_is_refused() -> None:
    inside: dict[str, Any] = {"weights": "random"}
    inside["model_kwargs"] = inside
    assert refuse(backbone=inside) == "the configuration is nested too deeply, or holds itself"


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for path, reason in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.yaml", "it is not UTF-8 text"),
        ("a\0b", "null"),
        ("~no_such_user_here/x", "home directory"),
    ):
        with pytest.raises(UserError, match=f"^cannot read .*{reason}"):
            load_config(path)


# Variables and paths


def test_variables_are_replaced_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_HERE", "/data")
    config = load("data.root=${DATA_HERE}/a", backbone={"weights": "random", "model_kwargs": {"x": ["${DATA_HERE}"]}})
    assert config.data.root == Path("/data/a")
    assert config.backbone.model_kwargs == {"x": ["/data"]}


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_HERE", raising=False)
    assert refuse("data.root=${DATA_HERE}/a").startswith(
        "'${DATA_HERE}/a': the environment variable DATA_HERE is not set"
    )


def test_relative_paths_start_at_the_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "pipeline.yaml").write_text(
        "run_dir: runs/a\ndata: {root: images}\nbackbone: {name: x, weights: w.pth}\nstore: {path: c.zarr}"
    )
    config = load_config("../pipeline.yaml", ["data.test_split=val"])
    assert [
        Path(p).resolve() for p in (config.run_dir, config.data.root, config.backbone.weights, config.store.path)
    ] == [tmp_path / name for name in ("runs/a", "images", "w.pth", "c.zarr")]


def test_paths_of_a_mapping_start_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load().run_dir == tmp_path / "runs/sidecache"
    assert load("run_dir=/absolute").run_dir == Path("/absolute")
    monkeypatch.setenv("HOME", "/home/someone")
    assert load("data.root=~/images").data.root == Path("/home/someone/images")


@pytest.mark.parametrize("weights", ["pretrained", "random", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"])
def test_names_of_weights_are_no_paths(weights: str) -> None:
    assert load(backbone={"weights": weights}).backbone.weights == weights


@pytest.mark.parametrize("path", ["s3://bucket/cache.zarr", "memory://cache", "gs://b/c"])
def test_urls_of_stores_stay_as_they_are(path: str) -> None:
    assert load(store={"path": path}).store.path == path


def test_a_home_that_does_not_exist_is_refused() -> None:
    assert "there is no home folder of that user" in refuse("data.root=~no_such_user_here/x")


# Methods and sweeps


def grids(**sections: Any) -> dict[str, list[dict[str, Any]]]:
    """Method -> its points: options that differ from the default, lr, weight_decay."""
    return {
        method.name: [
            trial.options.model_dump(exclude_defaults=True) | {"lr": trial.lr, "weight_decay": trial.weight_decay}
            for trial in method.trials
        ]
        for method in load(**sections).parsed_methods()
    }


def test_a_method_without_a_sweep_has_one_point() -> None:
    assert grids(methods=["linear_probe", "losa"], train={"lr": 0.5, "weight_decay": 0}) == {
        "linear_probe": [{"lr": None, "weight_decay": 0.0}],
        "losa": [{"lr": 0.5, "weight_decay": 0.0}],
    }


def test_names_and_dicts_mean_the_same() -> None:
    assert load(methods=["losa"]).parsed_methods() == load(methods=[{"name": "losa"}]).parsed_methods()


def test_a_sweep_over_an_option_reaches_only_the_methods_that_know_it() -> None:
    found = grids(methods=["linear_probe", "losa"], sweep={"rank": [2, 4]})
    assert len(found["linear_probe"]) == 1
    assert [point["rank"] for point in found["losa"]] == [2, 4]


def test_a_sweep_reaches_every_method_that_knows_the_key_in_every_combination() -> None:
    found = grids(sweep={"lr": [0.1, 0.2], "weight_decay": [0, 1]})
    pairs = {name: [(point["lr"], point["weight_decay"]) for point in points] for name, points in found.items()}
    assert pairs["losa"] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert pairs["linear_probe"] == [(None, 0), (None, 1)]


def test_what_an_entry_fixes_is_not_swept() -> None:
    methods = ["linear_probe", {"name": "losa", "weight_decay": 0.7}]
    found = grids(methods=methods, sweep={"weight_decay": [0.1, 0.2]})
    assert [point["weight_decay"] for point in found["linear_probe"]] == [0.1, 0.2]
    assert [point["weight_decay"] for point in found["losa"]] == [0.7]


@pytest.mark.parametrize(
    "entry", [{"lr": 0.1}, {"sweep": {"lr": [0.1]}}, {"epochs": 3}, {"batch_size": 3}, {"head_lr": 0.1}]
)
def test_a_solved_method_has_no_pace(entry: dict[str, Any]) -> None:
    key = "lr" if "sweep" in entry else next(iter(entry))
    message = refuse(methods=[{"name": "linear_probe", **entry}])
    legal = "legal: layers, pool, weight_decay"
    assert message == (
        f"methods: linear_probe: {key} given; it is not trained step by step, so this has no meaning; {legal}"
    )


def test_weight_decay_means_nothing_to_nearest_neighbors() -> None:
    found = grids(methods=["knn", "losa"], sweep={"weight_decay": [0.1, 0.2]}, train={"weight_decay": 0.3})
    assert found["knn"] == [{"lr": None, "weight_decay": 0.0}]
    assert refuse(methods=[{"name": "knn", "weight_decay": 0.1}]).startswith("methods: knn: weight_decay given; it is")


def test_an_entrys_own_sweep_goes_before_the_one_for_all() -> None:
    methods = ["linear_probe", {"name": "losa", "sweep": {"weight_decay": [0.7]}}]
    found = grids(methods=methods, sweep={"weight_decay": [0.1, 0.2]})
    assert [point["weight_decay"] for point in found["losa"]] == [0.7]
    assert [point["weight_decay"] for point in found["linear_probe"]] == [0.1, 0.2]


@pytest.mark.parametrize("search", [{}, {"driver": "random", "trials": 9}, {"driver": "optuna", "trials": 3}])
def test_searched_options_are_those_that_a_sweep_varies(search: dict[str, Any]) -> None:
    varied = {"name": "losa", "rank": 4, "sweep": {"token_rank": [0, 8, 16, 32], "dropout": [0.1], "lr": [0.1, 0.2]}}
    methods = load(methods=[varied, "ladder"], search=search).parsed_methods()
    found = [set(method.searched_options) for method in methods]
    assert {"token_rank"} <= found[0] <= {"token_rank", "dropout"}
    assert found[1] == set()


def test_a_method_may_give_its_head_a_rate_of_its_own() -> None:
    methods = load(methods=["losa", {"name": "ladder", "head_lr": 0.5}], train={"head_lr": 0.2}).parsed_methods()
    assert [method.head_lr for method in methods] == [0.2, 0.5]
    assert "head_lr" in refuse(methods=[{"name": "losa", "head_lr": 0}])


@pytest.mark.parametrize("option", ["epochs", "batch_size", "head_lr", "sweep", "name"])
def test_what_is_no_option_cannot_be_swept(option: str) -> None:
    message = refuse(methods=[{"name": "ladder", "sweep": {option: [1, 2]}}])
    assert message == (
        f"methods: ladder: sweep: {option} cannot be swept; legal: layers, lr, num_heads, pool, reduction, weight_decay"
    )


def test_what_is_fixed_and_swept_at_once_is_refused() -> None:
    message = refuse(methods=[{"name": "losa", "rank": 4, "sweep": {"rank": [8]}}])
    assert message == "methods: losa: rank is both fixed and swept; keep one of the two"


def test_a_method_may_be_given_twice_with_other_options_only() -> None:
    assert len(load(methods=["losa", {"name": "losa", "rank": 2}]).parsed_methods()) == 2
    assert len(load(methods=["losa", {"name": "losa", "epochs": 2}]).parsed_methods()) == 2
    for same in ("losa", {"name": "losa", "rank": 16}):
        assert refuse(methods=["losa", same]).startswith("methods: losa appears twice with the same options")


def test_a_method_may_have_its_own_epochs() -> None:
    methods = load(methods=["losa", {"name": "losa", "epochs": 7}], train={"epochs": 3}).parsed_methods()
    assert [method.epochs for method in methods] == [3, 7]


# Anything at all


SECTIONS = ["name", "run_dir", "data", "backbone", "store", "extract", "train", "methods", "sweep", "search", "x.y"]
KEYS = st.sampled_from(
    [
        "source",
        "root",
        "path",
        "layers",
        "tokens",
        "weights",
        "name",
        "every",
        "pool",
        "lr",
        "seeds",
        "rank",
        "sweep",
        "driver",
        "trials",
        "uniform",
        "choice",
        "a.b",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["all", "losa", "random", "~x/y", "${X}", "linear_probe", 10**400])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
QUICK = settings(
    derandomize=True, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.dictionaries(st.sampled_from(SECTIONS), VALUES, max_size=4))
def test_only_user_errors_come_out_of_any_document(document: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        load_config(document)


@QUICK
@given(st.sampled_from(SECTIONS), VALUES)
def test_only_user_errors_come_out_of_any_section(section: str, value: Any) -> None:
    with contextlib.suppress(UserError):
        load_config(MINIMAL | {section: value})


@QUICK
@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.text("&*!{}[]:,-#|>'\"% a1\n", max_size=30))
def test_only_user_errors_come_out_of_any_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "pipeline.yaml").write_bytes(b"backbone: {weights: random}\n" + text.encode())
    with contextlib.suppress(UserError):
        load_config(tmp_path / "pipeline.yaml", [f"train.lr={text}"])
