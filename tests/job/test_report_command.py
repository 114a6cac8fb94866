"""What a job leaves for its report, and the command that writes the report of one run or of several."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made_predictions import first_right, made_run
from run_command import Command

import sidecache
from adapt.config.pipeline import Config
from adapt.job.this_job import command as command_line
from adapt.run_dir.curves import find_curve, find_validated
from adapt.run_dir.job_record import read_job_record
from adapt.run_dir.results import read_results


def test_a_job_keeps_the_curves_of_its_search_and_of_its_trials(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.refit=true", "train.epochs=3")
    config = config.model_copy(update={"methods": ["linear_probe", {"name": "losa", "sweep": {"lr": [0.01, 0.001]}}]})
    sidecache.run(config)
    probe, losa = read_results(config.run_dir)
    own, searched = find_curve(config.run_dir, losa), find_validated(config.run_dir, losa)
    assert find_curve(config.run_dir, probe) is None  # it is solved
    assert len(own.train_loss) == 3
    assert not own.is_validated  # it was trained on validation rows too
    assert max(searched.val_score) == losa.val_score
    assert len(list((config.run_dir / "curves").iterdir())) == 3
    page = (config.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Validation score by epoch, in the search" in page
    assert ">chosen<" in page
    assert "The cache took " in page


def test_the_record_is_of_the_last_job_that_trained(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/sidecache", "run", "a file.yaml", "-o", "train.epochs=2"])
    config = tiny_config()
    sidecache.run(config)
    first = read_job_record(config.run_dir)
    assert first.command == "sidecache run 'a file.yaml' -o train.epochs=2"
    assert {"python", "torch", "timm", "sidecache"} <= set(first.versions)
    page = (config.run_dir / "report.html").read_text(encoding="utf-8")
    assert "sidecache run &#39;a file.yaml&#39; -o train.epochs=2" in page
    assert first.date in page
    monkeypatch.setattr("sys.argv", ["/usr/bin/sidecache", "run", "again.yaml"])
    sidecache.run(config)  # everything was trained before
    assert read_job_record(config.run_dir) == first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/opt/bin/sidecache", "train", "x.yaml"], "sidecache train x.yaml"),
        (["/lib/sidecache/__main__.py", "run", "x.yaml"], "python -m sidecache run x.yaml"),
        (["jobs/my job.py", "--fast"], "python 'jobs/my job.py' --fast"),
    ],
)
def test_a_command_can_be_given_again(arguments: list[str], expected: str) -> None:
    assert command_line(arguments) == expected


def test_several_runs_have_one_report(command: Command, tmp_path: Path) -> None:
    made_run(tmp_path / "a", {"losa": [first_right(900)]})
    made_run(tmp_path / "b", {"ladder": [first_right(800)]})
    made_run(tmp_path / "c", {"losa": [first_right(700)]}, dataset="roofs")
    output = tmp_path / "new" / "all.html"
    status, shown, log = command("report", *(str(tmp_path / name) for name in "abc"), "--output", str(output))
    assert (status, f"report: {output}" in log) == (0, True)
    page = output.read_text(encoding="utf-8")
    assert page.count("<section>") == 2  # digits of two runs, and roofs
    assert "<h1>3 runs</h1>" in page
    for name in ("losa", "ladder", "roofs"):
        assert name in page
        assert name in shown
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_report_of_several_runs_needs_a_file_for_a_page(command: Command, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        made_run(Path(folder), {"losa": [first_right(900)]}, dataset=folder[-1])
    status, _, error = command("report", *folders)
    assert (status, "add --output FILE.html" in error) == (2, True)
    for wrong in ("all.pdf", ""):
        status, _, error = command("report", *folders, "--output", str(tmp_path / wrong))
        assert (status, "legal: a file that ends in .html" in error) == (2, True)


def test_one_run_is_reported_in_its_directory(command: Command, tmp_path: Path) -> None:
    made_run(tmp_path, {"losa": [first_right(900)]})
    assert command("report", str(tmp_path))[0] == 0
    assert "<h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
