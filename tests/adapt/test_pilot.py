"""The pilot: what it holds is what stores would give, it finds where the class is, and its choice is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_command import Command, make_command

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.features.cached import StreamedFeatures
from adapt.features.held import hold
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from adapt.planning import pilot as pilots
from adapt.planning.pilot import Pilot, PresetScore, _HeldOut, run_pilot
from adapt.planning.preset_choice import find_pilot, require_preset
from extract.backbones.tapped_backbone import TappedBackbone
from extract.sources.open_source import ImageSource
from store.config import PRESETS, StoreConfig
from store.errors import JobError, UserError

MakeConfig = Callable[..., Config]


def read_patches(module: torch.nn.Module, images: torch.Tensor) -> dict[int, torch.Tensor]:
    """Two layers of a grid of 8 x 8 patches: an image of 8 x 8 x 8 as it is, and twice as large."""
    tokens = images.flatten(2).transpose(1, 2)
    return {0: tokens, 1: 2 * tokens}


def own_backbone() -> TappedBackbone:
    return TappedBackbone(torch.nn.Identity(), read_patches, torch.zeros(8, 8, 8), grid=(8, 8), name="patches")


def bright_columns(where: bool, count: int = 90, multi_label: bool = False) -> ImageSource:
    """Of three classes: which column is bright, two of them in the same half, or in which channel one is bright."""
    draw = np.random.default_rng(0)

    def split(n: int) -> list[tuple[torch.Tensor, Any]]:
        pairs: list[tuple[torch.Tensor, Any]] = []
        for row in range(n):
            label, image = row % 3, torch.from_numpy(0.1 * draw.normal(size=(8, 8, 8)).astype(np.float32))
            channel, column = (draw.integers(3), 3 * label) if where else (label, draw.integers(8))
            image[0] += 3  # of the background, so that a norm leaves the noise small
            image[1 + channel, :, column] += 20
            pairs.append((image, np.eye(3, dtype=np.uint8)[label] if multi_label else label))
        return pairs

    return sc.from_datasets({"train": split(count), "test": split(9)}, ["a", "b", "c"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds suffice where a class is certain or cannot be told at all, and few steps where it is easy."""
    monkeypatch.setattr(pilots, "_SEEDS", range(2))
    monkeypatch.setattr(pilots, "_VISITS", 500)


def own_config(folder: Path, *overrides: str, **sections: Any) -> Config:
    document = {
        "run_dir": str(folder / "run"),
        "backbone": {"weights": "random"},
        "store": {"path": str(folder / "cache.zarr"), "preset": "auto"},
        "train": {"epochs": 1, "seeds": [0]},
        "methods": ["linear_probe"],
    }
    return load_config(document | sections, overrides)


@pytest.mark.parametrize("preset", PRESETS)
def test_held_features_are_those_of_a_store(preset: str, tiny_config: MakeConfig) -> None:
    config = tiny_config("extract.batch_size=8")
    config = config.model_copy(update={"store": StoreConfig(path=config.store.path, preset=preset)})  # type: ignore[arg-type]
    inputs, cpu = Inputs(config), torch.device("cpu")
    stored = StreamedFeatures(sc.extract(config).store, cpu)
    rows = np.arange(24)
    held = hold(extraction_job(config, inputs), rows, {"it": config.store}, device=cpu)["it"]
    assert held.spec.layers == stored.spec.layers
    assert held.spec.layout == stored.spec.layout
    assert torch.equal(held.labels("train"), stored.labels("train"))
    ((_, of_store),) = stored.batches("train", [rows], stored.spec.layers)
    ((_, of_held),) = held.batches("train", [rows], stored.spec.layers)
    for layer in stored.spec.layers:
        step = stored.rounding(layer, of_store[layer]) + held.rounding(layer, of_held[layer])
        assert ((of_store[layer] - of_held[layer]).abs() <= step).all()
        assert len(of_store[layer].unique()) > 100


@pytest.mark.parametrize(("where", "smallest"), [(True, ("coarse", "grid")), (False, ("probe", "lean"))])
def test_the_pilot_finds_where_the_class_is(
    where: bool, smallest: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilots, "_VISITS", 3000)
    config, source = own_config(tmp_path), bright_columns(where, count=150)
    found = run_pilot(config, Inputs(config, source, own_backbone()))
    by_name = {preset.preset: preset for preset in found.presets}
    assert set(by_name) == set(PRESETS)
    assert found.chosen in smallest
    assert by_name[found.chosen].suffices
    assert [preset.bytes_per_sample for preset in found.presets] == sorted(p.bytes_per_sample for p in found.presets)
    assert by_name["full"].bytes_per_sample == 2 * 64 * 8 * 2
    assert by_name["grid"].bytes_per_sample == 2 * 64 * (8 + 4)
    assert found.n_samples == 150
    if where:
        assert by_name["probe"].behind > 30
        assert by_name["probe"].scores["linear_probe"] < 60 < by_name["grid"].scores["conv_ladder"]


def test_a_pilot_of_multi_label_samples(tmp_path: Path) -> None:
    config, source = own_config(tmp_path), bright_columns(where=False, multi_label=True)
    found = run_pilot(config, Inputs(config, source, own_backbone()))
    assert found.metric == "mean average precision"
    assert found.chosen in ("probe", "lean")


def test_options_beside_the_preset_hold_for_all_presets(tmp_path: Path) -> None:
    config = own_config(tmp_path, "store.dtype=float32", "store.layers=[1]")
    found = run_pilot(config, Inputs(config, bright_columns(where=False), own_backbone()))
    sizes = {preset.preset: preset.bytes_per_sample for preset in found.presets}
    assert sizes == {"probe": 32, "lean": 4 * 32, "coarse": 64 * 32, "grid": 64 * 32, "full": 64 * 32}


def test_presets_that_the_methods_cannot_be_trained_from_are_not_chosen(tmp_path: Path) -> None:
    config = own_config(tmp_path, "methods=[conv_ladder]")
    found = run_pilot(config, Inputs(config, bright_columns(where=False), own_backbone()))
    assert [preset.preset for preset in found.presets if preset.reason] == ["probe"]
    assert found.chosen != "probe"
    nothing = own_config(tmp_path, "methods=[bitfit]")
    with pytest.raises(UserError, match="end-to-end methods need a timm or ViViT backbone"):
        run_pilot(nothing, Inputs(nothing, bright_columns(where=False), own_backbone()))


def test_too_few_samples_are_refused_before_the_backbone_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilots, "hold", None)
    config = own_config(tmp_path)
    with pytest.raises(UserError, match=r"at least 10 training samples of 2 classes; dataset has 9 of 3"):
        run_pilot(config, Inputs(config, bright_columns(where=False, count=9), own_backbone()))


def test_the_error_is_that_of_samples_not_of_predictions() -> None:
    """Held out twice, with the same outcome both times, a sample tells no more than once."""
    draw = np.random.default_rng(0)
    right, wrong = draw.integers(0, 2, 50).astype(float), draw.integers(0, 2, 50).astype(float)
    once = [_HeldOut(0.0, np.arange(50), values) for values in (right, wrong)]
    twice = [_HeldOut(0.0, np.tile(np.arange(50), 2), np.tile(values, 2)) for values in (right, wrong)]
    assert once[0].behind(once[1]) == twice[0].behind(twice[1]) == 100 * (wrong - right).mean()
    assert once[0].error(once[1]) == pytest.approx(100 * (wrong - right).std() / np.sqrt(50))
    assert twice[0].error(twice[1]) == pytest.approx(once[0].error(once[1]))


def scored(preset: str, behind: float, error: float, reason: str = "") -> PresetScore:
    return PresetScore(preset=preset, bytes_per_sample=1, scores={}, behind=behind, error=error, reason=reason)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([scored("probe", 1.6, 1.0), scored("full", 0, 0)], "probe"),
        ([scored("probe", 1.7, 1.0), scored("full", 0, 0)], "full"),
        ([scored("probe", 0, 0, "no"), scored("lean", 3, 1), scored("grid", 2, 1)], "grid"),
        ([scored("probe", 0, 0, "no"), scored("lean", 9, 1), scored("grid", 0.5, 1), scored("full", 0, 0)], "grid"),
    ],
)
def test_the_smallest_that_suffices_is_chosen(scores: list[PresetScore], chosen: str) -> None:
    assert pilots._choose(scores) == chosen


# The choice


def made_pilot(chosen: str = "lean") -> Pilot:
    presets = [scored(preset, 0, 0) for preset in PRESETS]
    return Pilot(dataset="made", n_samples=10, metric="accuracy", presets=presets, chosen=chosen, seconds=1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pilots take no time and choose `lean`; the run directory of each is noted."""
    seen: list[str] = []

    def run(config: Config, inputs: Inputs) -> Pilot:
        seen.append(str(config.run_dir))
        return made_pilot()

    monkeypatch.setattr("adapt.planning.preset_choice.run_pilot", run)
    return seen


def test_a_job_runs_its_pilot_once_and_keeps_the_choice(tiny_config: MakeConfig, counted: list[str]) -> None:
    config = tiny_config("store={preset: auto, path: " + tiny_config().store.path + "}")
    sc.run(config)
    schema = sc.open_store(config.store.path).schema
    assert (schema.dtype, schema.provenance.tokens, schema.grid) == ("int8", '{"grid":2}', (2, 2))
    assert load_config(config.run_dir / "config.yaml").store == config.store.at_preset("lean")
    sc.extract(config)
    sc.run(config.model_copy(update={"methods": ["linear_probe", "knn"]}))
    sc.train(config)
    assert sc.open_store(config.store.path).schema == schema
    assert len(counted) == 1


def test_another_job_in_the_run_directory_has_a_pilot_of_its_own(tiny_config: MakeConfig, counted: list[str]) -> None:
    config = tiny_config("store={preset: auto}")
    for override in (None, "data.val_fraction=0.2", "backbone.image_size=64", "store.dtype=float32"):
        changed = config if override is None else tiny_config("store={preset: auto}", override)
        find_pilot(changed, Inputs(changed), print)
        find_pilot(changed, Inputs(changed), print)
        assert require_preset(changed).store.tokens == StoreConfig(preset="lean").tokens
    assert len(counted) == 4


def test_training_without_a_pilot_says_what_to_do(tiny_config: MakeConfig) -> None:
    config = tiny_config("store={preset: auto}")
    with pytest.raises(UserError, match=r"store.preset is auto, and .*pilot.json has no pilot of this job; run"):
        sc.train(config)
    assert not config.run_dir.exists()


@pytest.mark.parametrize("damage", ["x", '{"job": {}, "pilot": {}}', ""])
def test_a_damaged_file_is_refused(damage: str, tiny_config: MakeConfig, counted: list[str]) -> None:
    config = tiny_config("store={preset: auto}")
    find_pilot(config, Inputs(config), print)
    (config.run_dir / "pilot.json").write_text(damage)
    with pytest.raises(JobError, match=r"pilot\.json is damaged"):
        sc.run(config)


def test_methods_that_do_not_fit_the_kept_choice_are_refused_before_the_extraction(
    tiny_config: MakeConfig, counted: list[str]
) -> None:
    config = tiny_config("store={preset: auto}")
    find_pilot(config, Inputs(config), print)
    with pytest.raises(UserError, match=r"end-to-end methods need store\.tokens: all"):
        sc.run(config.model_copy(update={"methods": ["bitfit"]}))
    assert not Path(config.store.path).exists()


def write_job(config: Config, folder: Path) -> Path:
    document = json.loads(config.model_dump_json(include={"run_dir", "data", "backbone", "train", "methods"}))
    path = folder / "job.yaml"
    path.write_text(json.dumps(document | {"store": {"preset": "auto", "path": config.store.path}}))
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return make_command(monkeypatch, capsys)


def test_plan_runs_the_pilot_and_the_job_takes_its_choice(
    tiny_config: MakeConfig, tmp_path: Path, command: Command
) -> None:
    job = write_job(tiny_config(), tmp_path)
    before = json.loads(command("plan", job, "--json")[1])
    assert any("no pilot has chosen yet: this is the plan of `full`" in note for note in before["notes"])
    assert "pilots" not in before
    document = json.loads(command("plan", job, "--pilot", "--json")[1])
    (found,) = (Pilot.model_validate(pilot) for pilot in document["pilots"].values())
    chosen = next(preset for preset in found.presets if preset.preset == found.chosen)
    assert document["bytes_per_sample"] == chosen.bytes_per_sample
    _, shown, said = command("plan", job, "--pilot")
    assert f"store.preset: {found.chosen}" in shown
    assert "pilot of" not in said, "it is not run again"
    status, _, said = command("run", job)
    assert status == 0, said
    assert sc.open_store(tmp_path / "cache.zarr").schema.bytes_per_sample == chosen.bytes_per_sample


def test_every_part_of_a_study_has_a_pilot(tiny_config: MakeConfig, tmp_path: Path, command: Command) -> None:
    document = json.loads(tiny_config().model_dump_json(include={"data", "backbone", "train", "methods"}))
    data = document.pop("data")
    study = {
        "run_dir": str(tmp_path / "study"),
        "datasets": {"whole": data, "gone": data | {"root": str(tmp_path / "nothing")}},
        "backbones": {"tiny": document.pop("backbone")},
        "store": {"preset": "auto"},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(document | study))
    _, document_text, said = command("plan", tmp_path / "study.yaml", "--pilot", "--json")
    assert list(json.loads(document_text)["pilots"]) == ["whole/tiny"]
    assert "gone/tiny has no pilot" in said
    assert (tmp_path / "study/whole/tiny/pilot.json").exists()
