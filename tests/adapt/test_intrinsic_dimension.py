"""The local intrinsic dimension is the smallest d with 90% of the score of full; every point is trained once."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.job.intrinsic_dimension import (
    TARGETS_OF,
    Curve,
    Measurement,
    Point,
    entry_of,
    parse_dims,
    resolve_targets,
)
from adapt.job.intrinsic_figure import draw
from adapt.job.training_job import measure_intrinsic_dimension
from adapt.training.candidate import Candidate
from adapt.training.trials import Entry, train_entries
from extract.sources.open_source import SampleSplit
from store.errors import JobError, UserError

MakeConfig = Callable[..., Config]
ATTENTION, MLP = 4 * 32**2 + 4 * 32, 8 * 32**2 + 5 * 32  # parameters in a block of the tiny backbone
DIMS = (2, 16)


def make_measurement(attention: Sequence[float], mlp: Sequence[float], full: float = 80.0) -> Measurement:
    scores = {"attention": attention, "mlp": mlp}
    dims = (8, 32, 128)
    curves = [Curve(module, 4_224, tuple(map(Point, dims, map(float, values)))) for module, values in scores.items()]
    return Measurement(5, full, tuple(curves))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The trials that are trained for a measurement, in order."""
    found: list[dict[str, Any]] = []

    def counted(entries: Sequence[Entry], *rest: Any) -> list[Candidate]:
        found.extend(
            {"method": entry.method, "lr": entry.trial.lr, **entry.trial.options.model_dump()} for entry in entries
        )
        return train_entries(entries, *rest)

    monkeypatch.setattr("adapt.job.training_job.train_entries", counted)  # the trials of a job are trained elsewhere
    return found


def measure_tiny(config: Config, block: int | None = None, dims: Sequence[int] = DIMS) -> Measurement:
    inputs = Inputs(config)
    sc.extract(config)
    return measure_intrinsic_dimension(config, inputs, block, dims)


def read_record(config: Config) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((config.run_dir / "intrinsic.json").read_text())
    return document


# d_t


def test_the_intrinsic_dimension_is_the_smallest_that_reaches_ninety_percent_of_full() -> None:
    measurement = make_measurement([60, 72, 80], [71.9, 71.9, 79])
    attention, mlp = measurement.curves
    assert measurement.goal == pytest.approx(72)
    assert (measurement.intrinsic_dim(attention), measurement.intrinsic_dim(mlp)) == (32, 128)
    assert measurement.easiest is attention
    assert make_measurement([60, 61, 62], [60, 72, 62]).easiest.module == "mlp"


def test_a_score_that_falls_again_counts_where_it_first_reaches_the_goal() -> None:
    measurement = make_measurement([75, 60, 60], [60, 79, 79])
    assert [measurement.intrinsic_dim(curve) for curve in measurement.curves] == [8, 32]


@pytest.mark.parametrize(
    ("attention", "mlp", "easiest"),
    [
        ([60, 73, 74], [60, 74, 74], "mlp"),
        ([60, 73, 73], [60, 73, 80], "attention"),
        ([50, 60, 61], [70, 71, 60], "attention"),
        ([50, 60, 61], [50, 60, 62], "mlp"),
    ],
)
def test_the_higher_score_decides_where_no_dimension_is_the_lower(
    attention: list[float], mlp: list[float], easiest: str
) -> None:
    assert make_measurement(attention, mlp).easiest.module == easiest


def test_a_module_that_never_reaches_the_goal_says_so() -> None:
    measurement = make_measurement([60, 72, 80], [50, 60, 71])
    assert measurement.intrinsic_dim(measurement.curves[1]) is None
    assert measurement.describe(measurement.curves[1]) == "mlp: not reached up to d = 128 of 4,224 parameters"
    assert measurement.document()["curves"][1]["intrinsic_dim"] is None


# Measuring


def test_a_point_is_trained_in_its_module_block_and_dimension(tiny_config: MakeConfig, trained: list[Any]) -> None:
    measurement = measure_tiny(tiny_config("train.epochs=1"), block=1)
    assert [trial["method"] for trial in trained] == ["full"] + 4 * ["intrinsic"]
    points = [(trial["module"], trial["block"], trial["dim"]) for trial in trained[1:]]
    assert points == [("attention", 1, 2), ("attention", 1, 16), ("mlp", 1, 2), ("mlp", 1, 16)]
    assert [(curve.module, curve.size) for curve in measurement.curves] == [("attention", ATTENTION), ("mlp", MLP)]
    assert (measurement.block, measurement.dims) == (1, DIMS)


def test_the_last_block_that_is_read_is_the_default(tiny_config: MakeConfig) -> None:
    assert measure_tiny(tiny_config("train.epochs=1"), dims=(2,)).block == 2
    assert measure_tiny(tiny_config("train.epochs=1", "store.layers=[0, 1]"), dims=(2,)).block == 1


def test_points_that_are_done_are_not_trained_again(tiny_config: MakeConfig, trained: list[Any]) -> None:
    config = tiny_config("train.epochs=1")
    first = measure_tiny(config)
    figure = (config.run_dir / "intrinsic.svg").read_bytes()
    assert measure_tiny(config) == first
    assert len(trained) == 5
    assert (config.run_dir / "intrinsic.svg").read_bytes() == figure
    wider = measure_tiny(config, dims=(2, 4, 16))
    assert [trial["dim"] for trial in trained[5:]] == [4, 4]
    assert [point for point in wider.curves[0].points if point.dim != 4] == list(first.curves[0].points)
    measure_tiny(tiny_config("train.epochs=1", "train.lr=0.01"))
    assert len(trained) == 12, "another learning rate is another experiment"


def test_an_interrupted_measurement_goes_on_where_it_was(
    tiny_config: MakeConfig, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(
            "adapt.job.training_job.describe",
            lambda trial: sys.exit() if getattr(trial.options, "dim", 0) == 16 else "",
        )
        with pytest.raises(SystemExit):
            measure_tiny(config)
    assert len(read_record(config)["scores"]) == 2
    assert read_record(config)["measurement"] is None
    measure_tiny(config)
    assert [trial.get("dim") for trial in trained] == [None, 2, 16, 16, 2, 16]
    assert not list((config.run_dir / "checkpoints").iterdir())


def test_a_result_of_the_same_run_is_not_trained_again(tiny_config: MakeConfig, trained: list[Any]) -> None:
    config = tiny_config("train.epochs=1", "methods=[full]")
    (row,) = sc.run(config)
    assert measure_tiny(config).full_score == row.val_score
    assert {trial["method"] for trial in trained} == {"intrinsic"}


def test_the_entries_of_both_methods_say_how_they_are_trained(tiny_config: MakeConfig, trained: list[Any]) -> None:
    inside = "{name: intrinsic, seed: 7, sweep: {lr: [0.001, 0.1], dim: [1, 4], block: [0, 1]}}"
    config = tiny_config("train.epochs=1", f"methods=[{{name: full, lr: 0.0001}}, {inside}]", "sweep={pool: [cls]}")
    measurement = measure_tiny(config, dims=(2,))
    assert [trial["lr"] for trial in trained] == [0.0001, 0.001, 0.1, 0.001, 0.1]
    assert {(trial["seed"], trial["dim"], trial["block"]) for trial in trained[1:]} == {(7, 2, 2)}
    assert {trial["pool"] for trial in trained} == {"cls"}
    scores = [score["score"] for score in read_record(config)["scores"].values()]
    assert [curve.points[0].score for curve in measurement.curves] == [max(scores[1:3]), max(scores[3:])]


def test_without_an_entry_the_train_section_serves(tiny_config: MakeConfig) -> None:
    config = tiny_config("train.lr=0.007", "sweep={lr: [0.1, 0.2, 0.3]}")
    assert [trial.lr for trial in entry_of(config, "intrinsic").trials] == [0.007]


def test_only_training_rows_of_the_first_seed_are_read(
    tiny_config: MakeConfig, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.epochs=1", "train.seeds=[3, 4]")
    sc.extract(config)
    chunks = [path for path in Path(config.store.path).glob("test/layer_*/c/**/*") if path.is_file()]
    for file in chunks:
        file.write_bytes(b"damaged")
    decode, decoded = SampleSplit.__getitem__, set[str]()

    def watched(split: SampleSplit, row: int) -> Any:
        decoded.add(split.ids[row].split("/")[0])
        return decode(split, row)

    monkeypatch.setattr(SampleSplit, "__getitem__", watched)
    assert len(chunks) > 2
    assert measure_intrinsic_dimension(config, Inputs(config), None, (2,)).full_score > 0
    assert decoded == {"train"}
    assert len(trained) == 3


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(
    tiny_config: MakeConfig, trained: list[Any]
) -> None:
    with pytest.raises(UserError, match="block 9 does not exist; legal: 0 to 2"):
        measure_tiny(tiny_config(), block=9)
    with pytest.raises(UserError, match="dim 5000 is more than the 4224 parameters of the attention of block 2"):
        measure_tiny(tiny_config(), dims=(2, 5000))
    assert trained == []


def test_a_damaged_record_is_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    config.run_dir.mkdir()
    (config.run_dir / "intrinsic.json").write_text("{")
    with pytest.raises(JobError, match=r"intrinsic\.json is damaged .*; delete it, and its content is computed again"):
        measure_tiny(config)


# targets: auto


@pytest.mark.parametrize(("attention", "module"), [(80, "attention"), (10, "mlp")])
def test_auto_takes_the_targets_of_the_easiest_module(tiny_config: MakeConfig, attention: float, module: str) -> None:
    config = tiny_config("methods=[{name: kronecker, sweep: {lr: [0.1, 0.2], targets: [auto, [q, v], [k]]}}]")
    logged: list[str] = []
    measurement = make_measurement(3 * [attention], [10, 20, 80])
    method = resolve_targets(config.parsed_methods()[0], lambda: measurement, logged.append)
    targets = TARGETS_OF[module]  # type: ignore[index]
    expected = {(lr, chosen) for lr in (0.1, 0.2) for chosen in (targets, ("q", "v"), ("k",))}
    points = [(trial.lr, trial.options.targets) for trial in method.trials]  # type: ignore[attr-defined]
    assert set(points) == expected
    assert len(points) == len(expected)
    assert logged[0].startswith(f"kronecker: targets {', '.join(targets)} (block 5: attention: ")


def test_a_run_measures_once_and_trains_what_it_found(
    tiny_config: MakeConfig, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapt.job.intrinsic_record.DIMS", (2, 4))
    kronecker = "{name: kronecker, n: 4, targets: auto}"
    (row,) = sc.run(tiny_config("train.epochs=1", f"methods=[{kronecker}]"))
    assert len(trained) == 5
    found = read_record(tiny_config())["measurement"]
    assert found["dims"] == [2, 4]
    assert row.options["targets"] == {"attention": ["q", "v"], "mlp": ["fc1", "fc2"]}[found["easiest"]]
    rows = sc.run(tiny_config("train.epochs=1", f"methods=[{kronecker}, layernorm]"))
    assert len(trained) == 5
    assert rows[0].trial_id == row.trial_id


def test_auto_goes_by_what_was_measured_before(tiny_config: MakeConfig, trained: list[Any]) -> None:
    config = tiny_config("train.epochs=1", "methods=[{name: kronecker, n: 4, targets: auto}]")
    measured = measure_tiny(config, block=0, dims=(3,))
    sc.run(config)
    assert len(trained) == 3
    assert read_record(config)["measurement"] == json.loads(json.dumps(measured.document()))


def test_auto_without_a_run_is_refused() -> None:
    message = "targets: auto is measured within a run .*; legal here: a list of q, k, v, proj, fc1, fc2"
    with pytest.raises(UserError, match=message):
        sc.create_model("kronecker", "vit_tiny_patch16_224", 10, targets="auto")
    with pytest.raises(UserError, match=r"given 'all'; legal: a list of .*, each of them once, or auto within a run"):
        sc.create_model("kronecker", "vit_tiny_patch16_224", 10, targets="all")


# What a user sees


def test_the_command_prints_the_table_and_leaves_curve_and_figure(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("train.epochs=1")
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sidecache", "intrinsic", str(pipeline), "--dims", "16,2", *arguments])
        sc.main()
        return capsys.readouterr().out

    printed = run("--block", "1")
    assert "validation score in percent, block 1" in printed
    assert "full fine-tuning: " in printed
    assert "attention: " in printed
    document = json.loads(run("--block", "1", "--json"))
    assert document == read_record(config)["measurement"]
    assert [point["dim"] for point in document["curves"][1]["points"]] == [2, 16]
    for point in document["curves"][0]["points"]:
        assert f"{point['score']:.2f}" in printed
    assert (config.run_dir / "intrinsic.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("text", ["", "8,", "0,8", "-3", "1.5", "many"])
def test_dimensions_that_are_no_positive_whole_numbers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="legal: positive whole numbers with commas between, such as 8,32,128,512"):
        parse_dims(text)


def test_dimensions_are_put_in_order() -> None:
    assert parse_dims("512, 8,32,8") == (8, 32, 512)


def test_the_figure_shows_every_dimension_both_modules_and_the_goal() -> None:
    measurement = make_measurement([60, 72, 80], [50, 60, 71])
    svg = draw(measurement)
    texts = {element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")}
    assert {"8", "32", "128", "90% of full fine-tuning", "validation score (%)"} <= texts
    assert {"attention: d = 32 of 4,224 parameters", "mlp: not reached up to d = 128 of 4,224 parameters"} <= texts
    assert "stroke-dasharray" in svg
    assert draw(measurement) == svg
