"""The plan of a study: that of every part, their sums, and what would stop the study."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from small_study import backbone, write_study

import sidecache as sc
from adapt.job.trial_count import trials_of
from adapt.planning.job_facts import JobFacts
from adapt.planning.planner import make_plan
from adapt.planning.speeds import Speeds
from adapt.planning.step_speeds import StepSeconds
from adapt.study import plan as study_plan
from adapt.study.plan import StudyPlan, plan_study, print_study_plan

ROOT = Path(__file__).parents[2]
SPEEDS = Speeds(
    decode=0.0,
    forward=10.0,
    encode=1.0,
    write=3.0,
    steps={"resident": 4.0, "streamed": 5.0},
    end_to_end=None,
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Replace the measurements by fixed seconds a sample; counts them."""
    count = Counter[str]()

    def measure(job: JobFacts) -> Speeds:
        count[f"{job.shape.depth} layers"] += 1
        trials = [StepSeconds(points=0.0, seeds=4.0) for trials in trials_of(job.config) if trials.in_steps]
        return replace(SPEEDS, trials=tuple(trials))

    def decode(*_: object) -> float:
        count["decoding"] += 1
        return 0.0

    monkeypatch.setattr(study_plan, "measure_speeds", measure)
    monkeypatch.setattr(study_plan, "decode_seconds", decode)
    return count


def known(study: sc.Study, budget: int | None = None) -> StudyPlan:
    return plan_study(study, budget, with_speeds=False)


def test_a_part_is_planned_as_its_own_job_is(tmp_path: Path) -> None:
    study = sc.load_study(write_study(tmp_path, "a", "b"))
    plan = known(study)
    for part, planned in zip(study.parts, plan.parts, strict=True):
        assert planned.name == part.name
        alone = make_plan(part.config, with_speeds=False)
        assert planned.plan
        of_the_moment = {"free_bytes": 0, "reason": ""}
        assert asdict(planned.plan) | of_the_moment == asdict(alone) | of_the_moment


def test_totals_are_sums_over_the_parts(tmp_path: Path, measured: Counter[str]) -> None:
    backbones = {"two": backbone(2), "three": backbone(3)}
    study = sc.load_study(write_study(tmp_path, "a", "b", backbones=backbones, methods=["linear_probe", "losa"]))
    plan = plan_study(study)
    total = plan.totals()
    assert len(plan.plans) == total["parts"] == 4
    assert total["store_bytes"] == total["bytes_to_extract"] == sum(p.store_bytes for p in plan.plans if p.store_bytes)
    assert total["extract_seconds"] == pytest.approx(4 * 20 * 11.0)
    assert total["trials"] == 8
    assert total["train_seconds"] == pytest.approx(4 * 4.0 * (8 + 4 / 3 + 8 / 3))  # steps, validation and test
    assert total["fits"]
    assert measured == {"2 layers": 1, "3 layers": 1, "decoding": 2}, "once a backbone"


def test_a_store_that_is_there_costs_nothing_more(tmp_path: Path) -> None:
    study = sc.load_study(write_study(tmp_path, "a", "b"))
    sc.extract(study.parts[0].config)
    total = known(study).totals()
    assert total["bytes_to_extract"] == total["store_bytes"] / 2


def test_nothing_is_counted_for_features_that_are_not_stored(tmp_path: Path) -> None:
    study = sc.load_study(write_study(tmp_path, "a"), ["train.feature_source=online"])
    total = known(study, budget=1).totals()
    assert (total["store_bytes"], total["bytes_to_extract"], total["fits"]) == (0, 0, True)


def test_parts_that_cannot_start_are_listed_and_not_counted(tmp_path: Path) -> None:
    backbones = {"two": backbone(2), "lost": {**backbone(), "weights": "/nowhere.pt"}}
    path = write_study(tmp_path, "a", "b", backbones=backbones, methods=[{"name": "losa", "layers": [1]}])
    plan = known(sc.load_study(path, ["datasets.b.root=/nowhere"]))
    reasons = {part.name: part.reason for part in plan.parts}
    assert reasons["a/two"] == ""
    assert "data.root /nowhere does not exist" in reasons["b/two"]
    assert "backbone.weights '/nowhere.pt' does not exist" in reasons["a/lost"]
    assert plan.totals()["parts"] == 1


def test_stores_that_do_not_fit_together_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = sc.load_study(write_study(tmp_path, "a", "b"))
    total = known(study).totals()["store_bytes"]
    monkeypatch.setattr("adapt.planning.job_facts.free_disk_bytes", lambda _: total - 1)
    plan = known(study)
    assert all(part.plan and part.plan.fits for part in plan.parts), "each alone would"
    assert not plan.totals()["fits"]
    assert plan.notes[0].startswith("the stores of a, b take ")
    over = known(study, budget=total - 1)
    assert "more than the budget" in over.notes[1]


def test_the_command_prints_a_table_or_one_json_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: Counter[str]
) -> None:
    path = write_study(tmp_path, "a", "lost")
    (tmp_path / "images/lost").rename(tmp_path / "images/elsewhere")
    before = sorted(tmp_path.rglob("*"))
    run = command(monkeypatch)
    run("plan", path, "--json", "--budget", "1GB")
    document = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in document["parts"]] == ["a", "lost"]
    assert document["parts"][0]["plan"]["samples"] == {"train": 12, "test": 8}
    assert document["parts"][1]["plan"] is None
    assert document["total"]["budget_bytes"] == 10**9
    run("plan", path)
    out = capsys.readouterr().out
    assert "total of 1" in out
    assert "cannot start (1)" in out
    assert sorted(tmp_path.rglob("*")) == before
    assert measured


def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a command that succeeds."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sidecache", *map(str, arguments)])
        sc.main()

    return run


def test_the_example_is_planned_by_its_data(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECACHE_DATA", str(real_data))
    plan = known(sc.load_study(ROOT / "examples/study.yaml"))
    assert {part.name: part.plan.samples for part in plan.parts if part.plan} == {
        "rsscn7/vit_tiny": {"train": 420, "test": 280},
        "trashnet/vit_tiny": {"train": 479, "test": 239},
    }
    assert plan.totals()["trials"] == 2 * 4 * (12 + 3)


def test_unknown_seconds_are_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_study_plan(known(sc.load_study(write_study(tmp_path, "a"))), "title")
    assert "–" in capsys.readouterr().out
