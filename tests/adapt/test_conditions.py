"""Conditions hold all settings that affect a result, except method, options and seed; rows keep them."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.report.comparison import comparisons_of
from adapt.report.fingerprint import READABLE, conditions_of, digest
from adapt.report.seed_averages import summarize
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings

MakeConfig = Callable[..., Config]
SETTINGS, ROW_DRAW = Settings(epochs=10, batch_size=64), RowDraw(val_fraction=0.2)
IDENTITY = {"samples": {"train": "a"}, "layers": [0, 1], "tokens": "all", "dtype": "int8", "weights_digest": "b"}


def conditions(
    method: str = "losa", identity: dict[str, Any] = IDENTITY, row_draw: RowDraw = ROW_DRAW, **changes: Any
) -> dict[str, Any]:
    settings = replace(SETTINGS, **changes)
    return conditions_of(method, identity, "resident", settings=settings, row_draw=row_draw)


def test_every_setting_and_how_rows_are_drawn_is_a_condition_and_the_seed_is_none() -> None:
    assert {field.name for field in fields(Settings)} <= {*conditions()}
    assert "seed" not in conditions()
    for change in ({"val_fraction": 0.3}, {"val_fraction": None}, {"shots": 4}, {"fraction": 0.1}, {"refit": True}):
        assert conditions(row_draw=replace(ROW_DRAW, **change)) != conditions(), change  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*IDENTITY, "data"])
def test_everything_that_features_depend_on_is_a_condition(name: str) -> None:
    changed = conditions(identity=IDENTITY | {name: "another"})
    differing = {key for key, value in conditions().items() if changed[key] != value}
    assert len(differing - {*READABLE}) == 1
    assert differing <= {"features", *READABLE} or len(differing) == 1  # what is readable is part of a digest too


def test_a_solved_method_has_no_epochs() -> None:
    assert conditions("linear_probe", epochs=30, batch_size=8, optimizer="sgd") == conditions("linear_probe")
    assert conditions("linear_probe", balance_classes=True) != conditions("linear_probe")


def test_a_run_directory_keeps_settings_apart(tiny_config: MakeConfig) -> None:
    sc.run(tiny_config())
    sc.run(tiny_config("train.epochs=1"))
    rows = sc.run(tiny_config("methods=[linear_probe]", "train.class_weights=balanced"))
    plain, balanced = comparisons_of(summarize(rows))
    assert [s.label for s in plain.summaries] == ["linear_probe", "losa epochs=1", "losa epochs=2"]
    assert [s.label for s in balanced.summaries] == ["linear_probe"]
    assert balanced.title.endswith(" · balance_classes=true")


def test_a_grown_dataset_has_a_table_of_its_own(tiny_config: MakeConfig) -> None:
    config = tiny_config("methods=[linear_probe]")
    sc.run(config)
    (folder,) = config.data.root.glob("train/blue")  # type: ignore[union-attr]
    (folder / "more.png").write_bytes((folder / "0.png").read_bytes())
    before, after = summarize(sc.run(config))
    assert before.protocol["samples"] != after.protocol["samples"]
    assert len(comparisons_of([before, after])) == 2


def test_a_digest_stays_the_same_from_version_to_version() -> None:
    assert digest("a", 1, {"b": [2.5, None]}) == "cc624609331a4f3a"
