"""A study runs every part; a part that fails does so alone, and a study that was interrupted repeats nothing."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_command import Command
from small_study import backbone, write_study

import sidecache as sc
import sidecache.studies
from adapt.config.study import Study
from adapt.job import trial_run
from adapt.run_dir.lock import hold_run_dir
from adapt.run_dir.results import read_results
from adapt.study import runner
from adapt.study.record import read_record, write_record
from adapt.training.distributed import World
from sidecache.studies import extract_study, train_study
from store.errors import JobError
from store.local import durable_files

ROOT = Path(__file__).parents[2]
SEVERAL: dict[str, Any] = {
    "methods": ["linear_probe", {"name": "losa", "rank": 4, "token_rank": 2}],
    "train": {"epochs": 2, "batch_size": 8, "seeds": [0, 1], "device": "cpu"},
}


def study_of(folder: Path, *names: str, **changes: Any) -> Study:
    return sc.load_study(write_study(folder, *names, **changes))


def statuses(result: sc.StudyResult) -> dict[str, str]:
    return {part.name: part.status for part in result.parts}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of writing and content of everything that training or extraction makes."""
    made = [*folder.rglob("*.safetensors"), *folder.glob("**/cache.zarr/**/c/*"), *folder.rglob("search/*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in made if path.is_file()}


def fail_on(monkeypatch: pytest.MonkeyPatch, fragment: str) -> None:
    """Refuse to open files whose path has this fragment for writing, as a full disk does."""
    real = os.open

    def full(path: Any, flags: int, *given: Any, **named: Any) -> int:
        if fragment in str(path) and flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *given, **named)

    monkeypatch.setattr(durable_files.os, "open", full)


# A study that succeeds


def test_the_parts_of_a_study_need_no_stored_test_split(tmp_path: Path) -> None:
    store = {"dtype": "float32", "shard_samples": 5}
    both = sc.run_study(study_of(tmp_path / "both", "a", "b", store=store))
    train = sc.run_study(study_of(tmp_path / "train", "a", "b", store=store | {"splits": ["train"]}))
    assert statuses(train) == statuses(both) == {"a": "done", "b": "done"}
    rows = [[(row.dataset, row.trial_id, row.top1) for row in result.rows] for result in (both, train)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


def test_every_part_is_trained_and_all_rows_have_the_names_of_the_study(tmp_path: Path) -> None:
    backbones = {"two": backbone(2), "three": backbone(3)}
    study = study_of(tmp_path, "a", "b", backbones=backbones)
    result = sc.run_study(study)
    assert statuses(result) == dict.fromkeys(["a/two", "a/three", "b/two", "b/three"], "done")
    assert result.failures == []
    names = [(row.dataset, row.backbone) for row in result.rows]
    assert names == [(d, b) for d in ("a", "b") for b in ("two", "three")]
    for part in study.parts:
        assert len(read_results(study.run_dir / part.name)) == 1
        assert sc.open_store(study.run_dir / part.name / "cache.zarr").num_samples("train") == 12
        assert sc.load_config(study.run_dir / part.name / "config.yaml") == part.config
    with (study.run_dir / "results.csv").open() as file:
        assert [(row["dataset"], row["backbone"]) for row in csv.DictReader(file)] == names
    assert sorted(path.name for path in study.run_dir.iterdir() if path.name[0] != ".") == [
        "a",
        "b",
        "report.html",
        "results.csv",
        "study.json",
    ]


def test_two_names_of_the_same_samples_are_told_apart(tmp_path: Path) -> None:
    path = write_study(tmp_path, "a", "b")
    result = sc.run_study(sc.load_study(path, [f"datasets.b.root={tmp_path / 'images/a'}"]))
    a, b = ([row for row in result.rows if row.dataset == name] for name in "ab")
    assert [row.trial_id for row in a] == [row.trial_id for row in b], "they are the same trials"
    assert len(a) == 1
    page = (tmp_path / "runs/report.html").read_text()
    assert all(re.search(rf"<h2>{name} <small>vit_tiny", page) for name in "ab")


def test_features_that_are_not_stored_have_the_names_too(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a", train={"feature_source": "online", "seeds": [0]})
    result = sc.run_study(study)
    assert [row.dataset for row in result.rows] == ["a"]
    assert not (study.run_dir / "a/cache.zarr").exists()


def test_the_commands_do_the_same_in_two_steps(command: Command, tmp_path: Path) -> None:
    path = write_study(tmp_path, "a", "b")
    status, _, err = command("extract", path)
    assert status == 0
    assert err.count("extracted 20 samples") == 2
    assert not (tmp_path / "runs/results.csv").exists()
    status, out, err = command("train", path, "-o", "datasets.b.val_fraction=0.5")
    assert status == 0
    assert all(f" {name} · vit_tiny_patch16_224" in out for name in "ab")
    assert err.endswith(f"results: {tmp_path}/runs/results.csv, report: {tmp_path}/runs/report.html\n")
    assert read_record(tmp_path / "runs").command == "train"


def test_report_shows_the_whole_again(command: Command, tmp_path: Path) -> None:
    path = write_study(tmp_path, "a", "lost")
    (tmp_path / "images/lost").rename(tmp_path / "images/elsewhere")
    _, table, _ = command("run", path)
    (tmp_path / "runs/report.html").unlink()
    status, out, _ = command("report", tmp_path / "runs")
    assert status == 0
    assert out == table
    assert "lost" in out
    page = (tmp_path / "runs/report.html").read_text()
    assert "<h2>Failed <small>1</small></h2>" in page
    assert "images/lost does not exist" in page


# Parts that fail


def test_parts_that_cannot_start_are_found_before_the_first_extraction(command: Command, tmp_path: Path) -> None:
    path = write_study(tmp_path, "a", "lost", "z")
    (tmp_path / "images/lost").rename(tmp_path / "images/elsewhere")
    status, out, err = command("run", path)
    lines = err.splitlines()
    assert status == 1
    assert lines[0].startswith("lost failed: data.root ")
    assert [line for line in lines if line.startswith("part ")] == ["part 1 of 2: a", "part 2 of 2: z"]
    assert lines[-2] == "sidecache: 1 of 3 parts failed"
    assert lines[-1].startswith("lost: data.root ")
    assert "does not exist" in lines[-1]
    assert "failed (1)" in out
    assert all(f" {name} · vit" in out for name in "az")


def test_methods_that_do_not_fit_a_backbone_fail_its_parts_alone(tmp_path: Path) -> None:
    backbones = {"two": backbone(2), "three": backbone(3)}
    study = study_of(tmp_path, "a", backbones=backbones, methods=[{"name": "losa", "layers": [2]}])
    result = sc.run_study(study)
    assert statuses(result) == {"a/two": "failed", "a/three": "done"}
    assert not (study.run_dir / "a/two").exists()
    assert "layers" in result.failures[0][1]


def test_an_image_that_cannot_be_decoded_fails_its_part_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a", "broken", "z")
    (tmp_path / "images/broken/train/red/3.png").write_bytes(b"no image")
    result = sc.run_study(study)
    assert statuses(result) == {"a": "done", "broken": "failed", "z": "done"}
    assert "3.png" in dict(result.failures)["broken"]
    assert {row.dataset for row in result.rows} == {"a", "z"}


def test_a_part_that_was_repaired_is_all_that_the_next_run_does(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a", "broken")
    image = tmp_path / "images/broken/train/red/3.png"
    good = image.read_bytes()
    image.write_bytes(b"no image")
    first = sc.run_study(study)
    done = state(study.run_dir / "a")
    image.write_bytes(good)
    second = sc.run_study(study, on_changed="new-store")  # the first had recorded the damaged image
    assert statuses(second) == {"a": "done", "broken": "done"}
    assert state(study.run_dir / "a") == done
    assert second.parts[0].seconds > first.parts[0].seconds, "of all runs"


def test_a_full_disk_in_the_middle_leaves_the_rest_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, "a", "b", "c")
    with monkeypatch.context() as patch:
        fail_on(patch, "runs/b/")
        result = sc.run_study(study)
    assert statuses(result) == {"a": "done", "b": "failed", "c": "done"}
    assert "No space left on device" in dict(result.failures)["b"]
    assert {row.dataset for row in result.rows} == {"a", "c"}
    assert statuses(sc.run_study(study)) == {"a": "done", "b": "done", "c": "done"}


def test_a_record_that_cannot_be_written_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(tmp_path, "a", "b")
    with monkeypatch.context() as patch:
        fail_on(patch, "study.json")
        result = sc.run_study(study)
    assert statuses(result) == {"a": "done", "b": "done"}
    assert "study.json cannot be written (No space left on device)" in capsys.readouterr().err


def test_memory_that_runs_out_fails_a_part_and_a_defect_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, real = study_of(tmp_path, "a", "b"), sidecache.studies.run_job

    def fail_with(error: Exception) -> None:
        def run(config: sc.Config, *rest: Any, **given: Any) -> Any:
            if config.report_as.dataset == "a":
                raise error
            return real(config, *rest, **given)

        monkeypatch.setattr(sidecache.studies, "run_job", run)

    fail_with(MemoryError())
    result = sc.run_study(study)
    assert statuses(result) == {"a": "failed", "b": "done"}
    assert result.failures[0][1].startswith("out of memory; lower train.batch_size")
    fail_with(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        sc.run_study(study)


def test_damaged_results_of_a_part_fail_it_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a", "b")
    sc.run_study(study)
    (study.run_dir / "a/results.json").write_text("[")
    result = sc.run_study(study)
    assert statuses(result) == {"a": "failed", "b": "done"}
    assert "results.json is damaged" in result.failures[0][1]
    assert {row.dataset for row in result.rows} == {"b"}


def test_under_torchrun_a_part_that_fails_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, "broken", "z")
    (tmp_path / "images/broken/train/red/3.png").write_bytes(b"no image")
    monkeypatch.setattr(runner, "world", lambda: World(0, 2))
    with pytest.raises(JobError, match=r"^broken failed: .*3\.png.*; under torchrun the study ends there"):
        sc.run_study(study)
    assert [part.status for part in read_record(study.run_dir).parts] == ["failed", "not started"]


def test_training_without_a_store_fails_every_part(tmp_path: Path) -> None:
    result = train_study(study_of(tmp_path, "a"))
    assert statuses(result) == {"a": "failed"}
    assert (tmp_path / "runs/report.html").exists()


def test_a_wrong_study_is_the_users_mistake(command: Command, tmp_path: Path) -> None:
    path = write_study(tmp_path, "a", "b")
    for override, message in (("datasets.a.rot=x", "datasets.a.rot: unknown key"), ("store.path=x", "would share")):
        for name in ("run", "plan", "extract", "train"):
            status, out, err = command(name, path, "-o", override)
            assert (status, out) == (2, "")
            assert message in err
    for arguments in (("intrinsic", path), ("verify", "x.zarr", "--repair", path)):
        status, _, err = command(*arguments)
        assert status != 0
    status, _, err = command("intrinsic", path)
    assert status == 2
    assert f"{path} is a study of several jobs" in err


# Interruption


def test_an_interrupted_study_goes_on_and_repeats_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = write_study(tmp_path, "a", "b", **SEVERAL), tmp_path / "runs"
    real = trial_run.TrialRun.record

    def stop(run: trial_run.TrialRun, *trained: Any) -> Any:
        if run.config.report_as.dataset == "b" and run.spec.seed == 1:
            raise KeyboardInterrupt
        return real(run, *trained)

    with monkeypatch.context() as patch:
        patch.setattr(trial_run.TrialRun, "record", stop)
        status, _, err = command("run", path)
    assert status == 130
    assert "failed" not in err
    assert [part.status for part in read_record(runs).parts] == ["done", "not started"]
    before, rows = state(runs), [row for name in "ab" for row in read_results(runs / name)]
    status, _, err = command("run", path)
    assert status == 0
    after = state(runs)
    assert {name: after[name] for name in before} == before
    assert err.count("nothing to extract") == 2
    assert err.count("finished before") == len(rows)
    assert read_results(runs / "a") == rows[:4]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path, runs = write_study(tmp_path, "a", "b", "c", **SEVERAL), tmp_path / "runs"
    line = [sys.executable, "-m", "sidecache", "run", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished: dict[str, tuple[int, bytes]] = {}
    for name in "ab":  # killed as the first trial of each is finished
        process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not (runs / name / "results.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {key: value for key, value in state(runs).items() if key in finished} == finished
        done = {str(file) for part in runs.iterdir() if (part / "results.json").exists() for file in adaptors(part)}
        finished = {key: value for key, value in state(runs).items() if key in done}
        assert finished
    ended = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {key: value for key, value in state(runs).items() if key in finished} == finished
    assert [part.status for part in read_record(runs).parts] == ["done"] * 3
    alone = study_of(tmp_path / "alone", "a", "b", "c", **SEVERAL)
    scores = [(row.trial_id, row.top1) for row in sc.run_study(alone).rows]
    assert [(row.trial_id, row.top1) for name in "abc" for row in read_results(runs / name)] == scores


def adaptors(part: Path) -> list[Path]:
    """The adaptor files of the trials that have a row."""
    return [trial_run.adaptor_path(part, row) for row in read_results(part)]


def test_a_second_study_in_the_same_run_dir_is_refused(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a")
    with hold_run_dir(study.run_dir), pytest.raises(JobError, match=r"runs is in use by .*; wait"):
        sc.run_study(study)
    assert not (study.run_dir / "a").exists()


def test_a_part_that_another_job_works_on_fails_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a", "b")
    with hold_run_dir(study.run_dir / "a"):
        result = sc.run_study(study)
    assert statuses(result) == {"a": "failed", "b": "done"}
    assert "a is in use by" in result.failures[0][1]


# The record


def test_a_changed_record_is_refused_by_name(tmp_path: Path) -> None:
    study = study_of(tmp_path, "a")
    extract_study(study)
    record = read_record(study.run_dir)
    write_record(study.run_dir, record)
    assert read_record(study.run_dir) == record
    path = study.run_dir / "study.json"
    path.write_text(path.read_text().replace('"done"', '"failed"'))
    for read in (lambda: read_record(study.run_dir), lambda: sc.run_study(study)):
        with pytest.raises(JobError, match=r"study\.json is damaged .*; delete it, and its content is computed again"):
            read()
    path.unlink()
    assert statuses(sc.run_study(study)) == {"a": "done"}


def test_the_record_has_no_values_of_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", str(tmp_path / "images/a"))
    path = write_study(tmp_path, "a")
    study = sc.load_study(path, ["datasets.a.root=${FOLDER}"])
    sc.run_study(study)
    for name in ("study.json", "report.html"):
        text = (study.run_dir / name).read_text()
        assert "${FOLDER}" in text
        assert str(tmp_path) not in text
    assert json.loads((study.run_dir / "study.json").read_text())["parts"][0]["status"] == "done"
