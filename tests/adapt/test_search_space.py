"""Ranges and drivers of a search: what is drawn, and what is refused when the configuration is loaded."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.config import pipeline, search_config
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.search_space import Choice, IntUniform, LogUniform, Range, Uniform
from adapt.config.trials import MethodConfig
from adapt.features.specs import spec_of_backbone
from adapt.job.checks import require_trainable
from adapt.job.feature_set import needed_layers
from adapt.job.intrinsic_dimension import TARGETS_OF, Curve, Measurement, Point, resolve_targets
from adapt.run_dir.config_file import write_config
from extract.backbones.backbone_shape import backbone_shape
from store.errors import UserError

RANDOM = {"driver": "random", "trials": 12}
RANGES = {"lr": {"log_uniform": [1e-4, 1e-1]}, "rank": {"int_uniform": [4, 64]}, "dropout": {"uniform": [0, 0.5]}}
SMALL_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}


def load(search: dict[str, Any], methods: list[Any], sweep: dict[str, Any] | None = None) -> Config:
    backbone = {
        "name": "vit_tiny_patch16_224",
        "weights": "random",
        "image_size": 32,
        "model_kwargs": SMALL_VIT,
    }
    return load_config({"backbone": backbone, "methods": methods, "sweep": sweep or {}, "search": search})


def parse(search: dict[str, Any], methods: list[Any], sweep: dict[str, Any] | None = None) -> tuple[MethodConfig, ...]:
    return load(search, methods, sweep).parsed_methods()


def refuse(search: dict[str, Any], sweep: dict[str, Any], name: str = "losa") -> str:
    with pytest.raises(UserError) as refused:
        load(search, [{"name": name, "sweep": sweep}])
    return str(refused.value)


def optuna_or_skip(trials: int = 12) -> dict[str, Any]:
    pytest.importorskip("optuna", reason="Optuna is optional: pip install 'sidecache[optuna]'")
    return {"driver": "optuna", "trials": trials}


# Axes

bounds = st.floats(-1e6, 1e6)
positive = st.floats(1e-12, 1e6)
AXES = st.one_of(
    st.tuples(positive, positive).filter(lambda b: b[0] < b[1]).map(lambda b: LogUniform(log_uniform=b)),
    st.tuples(bounds, bounds).filter(lambda b: b[0] < b[1]).map(lambda b: Uniform(uniform=b)),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda b: IntUniform(int_uniform=(b[0], b[0] + b[1]))),
    st.lists(st.none() | st.integers() | st.text() | st.lists(st.integers()), min_size=1).map(
        lambda v: Choice(choice=v)
    ),
)


@given(AXES, st.integers(0, 2**32 - 1))
def test_what_is_drawn_is_within_the_ends_and_of_their_type(axis: Range, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        drawn = axis.draw(rng)
        assert min(axis.ends) <= drawn <= max(axis.ends)
        assert type(drawn) is type(axis.ends[0])
        if isinstance(axis, Choice):
            assert axis.value(drawn) in axis.choice


def test_log_uniform_draws_as_many_points_from_each_decade() -> None:
    axis, rng = LogUniform(log_uniform=(1e-4, 1e-1)), np.random.default_rng(0)
    decades = np.bincount([math.floor(math.log10(axis.draw(rng))) + 4 for _ in range(3000)])
    assert len(decades) == 3
    assert all(900 < n < 1100 for n in decades)


def test_int_uniform_draws_both_ends() -> None:
    rng = np.random.default_rng(0)
    assert {IntUniform(int_uniform=(2, 4)).draw(rng) for _ in range(99)} == {2, 3, 4}


# Points


def test_random_points_are_known_when_the_configuration_is_loaded() -> None:
    (method,), (again,) = (parse(RANDOM, [{"name": "losa", "sweep": RANGES}]) for _ in range(2))
    assert method == again
    assert method.space is None
    assert len({trial.key for trial in method.trials}) == 12
    for trial in method.trials:
        options = trial.options
        assert 1e-4 <= trial.lr <= 1e-1  # type: ignore[operator]
        assert 4 <= options.rank <= 64  # type: ignore[attr-defined]
        assert 0 <= options.dropout <= 0.5  # type: ignore[attr-defined]


def test_another_seed_or_method_has_other_points() -> None:
    sweep = {"lr": {"log_uniform": [1e-4, 1e-1]}}
    losa, ladder = parse(RANDOM, ["losa", "ladder"], sweep)
    (reseeded,) = parse({**RANDOM, "seed": 1}, ["losa"], sweep)
    points = [{trial.lr for trial in method.trials} for method in (losa, ladder, reseeded)]
    assert not points[0] & points[1]
    assert not points[0] & points[2]


@pytest.mark.parametrize("driver", ["random", "optuna"])
def test_every_method_that_is_searched_has_the_same_number_of_points(driver: str) -> None:
    if driver == "optuna":
        optuna_or_skip()
    sweep = {"lr": {"log_uniform": [1e-4, 1e-1]}, "weight_decay": {"log_uniform": [1e-6, 1.0]}}
    methods = parse({"driver": driver, "trials": 12}, ["linear_probe", "losa", "bitfit"], sweep)
    assert [len(method.trials) for method in methods] == [12, 12, 12]
    assert [len(method.trials) for method in parse({"driver": driver, "trials": 12}, ["losa"])] == [1]


@pytest.mark.parametrize("driver", ["random", "optuna"])
def test_a_space_of_fewer_points_is_searched_whole(driver: str) -> None:
    if driver == "optuna":
        optuna_or_skip()
    sweep = {"rank": {"int_uniform": [1, 3]}, "pool": ["mean", "cls_mean"]}
    (method,) = parse({"driver": driver, "trials": 50}, [{"name": "losa", "sweep": sweep}])
    assert len(method.trials) == 6
    assert method.space is None


def test_choices_may_be_of_any_type_and_a_list_is_a_grid() -> None:
    layers = ["all", [1, 3], {"last": 2}]
    (method,) = parse({}, [{"name": "losa", "sweep": {"layers": {"choice": layers}}}])
    assert method == parse({}, [{"name": "losa", "sweep": {"layers": layers}}])[0]
    (drawn,) = parse(RANDOM, [{"name": "losa", "sweep": {"layers": layers, "lr": {"uniform": [0.1, 0.2]}}}])
    assert len({trial.options.model_dump_json() for trial in drawn.trials}) == 3


def test_a_configuration_with_ranges_is_read_back_as_it_was_written(tmp_path: Any) -> None:
    config = load(RANDOM, ["losa"], RANGES).model_copy(update={"run_dir": tmp_path})
    write_config(config)
    assert load_config(tmp_path / "config.yaml").parsed_methods() == config.parsed_methods()


# Checks of all drivers


@pytest.mark.parametrize("driver", ["grid", "random", "optuna"])
def test_layers_of_every_point_are_read_and_every_method_is_built(driver: str) -> None:
    search = {} if driver == "grid" else optuna_or_skip() if driver == "optuna" else RANDOM
    sweep = {"layers": [[0], [1, 2]], "token_rank": [0, 2]}
    config = load(search, [{"name": "losa", "sweep": sweep}])
    spec = spec_of_backbone(backbone_shape(config.backbone), range(4), "all")
    assert needed_layers(config, spec, 2) == (0, 1, 2, 3)
    require_trainable(config)
    with pytest.raises(UserError, match="pool 'cls' reads the class token"):
        require_trainable(load(search, [{"name": "losa", "sweep": {**sweep, "pool": ["mean", "cls"]}}]))


def test_ends_that_no_point_happens_to_hold_are_checked() -> None:
    search = optuna_or_skip(trials=2)
    sweep = {"pool": [*["mean"] * 30, "cls"], "lr": {"uniform": [0.1, 0.2]}}
    config = load(search, [{"name": "losa", "sweep": sweep}])
    (method,) = config.parsed_methods()
    assert {trial.options.pool for trial in method.trials} == {"mean"}
    with pytest.raises(UserError, match="pool 'cls' reads the class token"):
        require_trainable(config)


def test_measured_targets_replace_auto_in_what_optuna_proposes() -> None:
    sweep = {"lr": {"log_uniform": [1e-4, 1e-1]}, "targets": ["auto", ["k"]]}
    (method,) = parse(optuna_or_skip(), [{"name": "kronecker", "sweep": sweep}])
    curves = tuple(Curve(module, 9, (Point(1, 50.0),)) for module in TARGETS_OF)
    resolved = resolve_targets(method, lambda: Measurement(0, 50.0, curves), lambda _: None)
    assert resolved.space
    assert {trial.options.targets for trial in resolved.space.ends()} == {("q", "v"), ("k",)}  # type: ignore[attr-defined]
    (fixed,) = parse(optuna_or_skip(), [{"name": "kronecker", "targets": "auto", "sweep": {"lr": sweep["lr"]}}])
    resolved = resolve_targets(fixed, lambda: Measurement(0, 50.0, curves), lambda _: None)
    assert resolved.space
    assert {trial.options.targets for trial in resolved.space.ends()} == {("q", "v")}  # type: ignore[attr-defined]


# Messages


@pytest.mark.parametrize(
    "values",
    [
        {"uniform": [0.5, 0.1]},
        {"uniform": [0.1, 0.1]},
        {"log_uniform": [0, 1]},
        {"log_uniform": [-1.0, 1.0]},
        {"int_uniform": [4, 2]},
        {"int_uniform": [1.5, 2.5]},
        {"int_uniform": [0, 2**60]},
        {"uniform": [-1.7e308, 1.7e308]},
        {"uniform": [0.1]},
        {"uniform": [0.0, math.inf]},
        {"uniform": [math.nan, 1.0]},
        {"uniform": [0, 1], "choice": [1]},
        {"choice": []},
        {"normal": [0, 1]},
        {},
    ],
)
def test_an_illegal_range_is_refused_in_one_line(values: dict[str, Any]) -> None:
    own = refuse(RANDOM, {"lr": values})
    assert own.startswith("methods: losa: sweep: given {'lr': {")
    with pytest.raises(UserError) as refused:
        load(RANDOM, ["losa"], {"lr": values})
    shared = str(refused.value)
    assert shared.startswith(f"sweep.lr: given {values}")
    for message in (own, shared):
        assert "legal: {option: [values]} or {option: RANGE}, where RANGE is {uniform: [low, high]}" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("lr", {"uniform": [0, 0.1]}, "lr: given 0.0; input should be greater than 0"),
        ("dropout", {"uniform": [0.5, 1.5]}, "dropout: given 1.5; input should be less than"),
        ("rank", {"int_uniform": [-1, 99]}, "rank: given -1; input should be greater than or equal to 1"),
        ("rank", {"log_uniform": [4, 64]}, "rank: given 4.0; input should be a valid integer"),
        ("rank", {"choice": [4, "many"]}, "rank: given 'many'; input should be a valid integer"),
        ("rnk", {"int_uniform": [1, 9]}, "rnk: unknown key; legal keys here: rank"),
        ("epochs", {"int_uniform": [1, 9]}, "sweep: epochs cannot be swept"),
    ],
)
@pytest.mark.parametrize("driver", ["random", "optuna"])
def test_both_ends_of_a_range_must_be_legal(option: str, values: Any, message: str, driver: str) -> None:
    if driver == "optuna":
        optuna_or_skip()
    assert message in refuse({"driver": driver, "trials": 1}, {option: values})


def test_a_grid_has_no_ranges() -> None:
    message = refuse({}, {"lr": {"log_uniform": [1e-4, 1e-1]}})
    assert message.startswith("methods: losa: sweep: lr is a range, and search.driver grid needs a list of values")
    assert "search.driver to random or optuna" in message


@pytest.mark.parametrize("driver", ["random", "optuna"])
def test_the_number_of_points_must_be_given(driver: str) -> None:
    if driver == "optuna":
        optuna_or_skip()
    assert refuse({"driver": driver}, RANGES) == (
        f"search.trials is missing: search.driver {driver} needs a number, such as 32"
    )


def test_a_grid_has_its_own_number_of_points() -> None:
    assert refuse({"trials": 9}, {"lr": [0.1]}).startswith(
        "search.trials: given 9, but search.driver grid trains every"
    )


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"driver": "bayes"}, "search.driver: given 'bayes'; input should be 'grid', 'random' or 'optuna'"),
        ({"driver": "random", "trials": 10_001}, "search.trials: given 10001; legal: with driver random or optuna"),
        ({"driver": "random", "trials": 0}, "search.trials: given 0; legal: with driver random or optuna"),
        ({"batch": 0}, "search.batch: given 0; input should be greater than or equal to 1"),
        ({"seed": 2**32}, "search.seed: given 4294967296; input should be less than 4294967296"),
        ({"epochs": 0}, "search.epochs: given 0; legal: a positive whole number of epochs, or null"),
    ],
)
def test_illegal_settings_of_a_search_are_refused(search: dict[str, Any], message: str) -> None:
    assert message in refuse(search, {})


@pytest.mark.parametrize("halving", [{"factor": 1}, {"min_epochs": 0}, {"rate": 3}, 3])
def test_illegal_halving_is_refused(halving: Any) -> None:
    document = {"backbone": {"weights": "random"}, "train": {"halving": halving}}
    with pytest.raises(UserError, match=r"^train\.halving"):
        load_config(document)


def test_a_space_with_too_many_corners_for_optuna_is_refused() -> None:
    sweep = {"rank": list(range(1, 40)), "token_rank": list(range(40))}
    assert "its sweep has 1,560 combinations of choices and bounds" in refuse(optuna_or_skip(), sweep)
    assert len(parse(RANDOM, [{"name": "losa", "sweep": sweep}])[0].trials) == 12


@pytest.mark.parametrize("extra", ["optuna", "tensorboard"])
def test_what_is_not_installed_is_named_when_the_configuration_is_loaded(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, search_config):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    sections = {
        "optuna": {"search": {"driver": "optuna", "trials": 3}},
        "tensorboard": {"train": {"tensorboard": True}},
    }
    with pytest.raises(UserError, match=rf"install it with: pip install 'sidecache\[{extra}\]'"):
        load_config({"backbone": {"weights": "random"}, **sections[extra]})
