"""One job at a time runs in a run directory; a killed job leaves no lock."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.run_dir.files import write_text
from adapt.run_dir.lock import hold_run_dir
from sidecache.steps import print_results, write_run_report
from store.errors import JobError, Note, UserError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from adapt.run_dir.lock import hold_run_dir
with hold_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_job(tmp_path: Path):
    """A process that holds the lock of `tmp_path / "run"` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_job_is_refused_before_it_extracts_and_names_the_first(
    tiny_config: Callable[..., Config], other_job: subprocess.Popen[str], tmp_path: Path
) -> None:
    config = tiny_config()
    for job in (sc.run, sc.train):
        with pytest.raises(JobError, match=rf"run is in use by `.*` \(process {other_job.pid} on .*, since .*\); wait"):
            job(config)
    assert not (tmp_path / "cache.zarr").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_command_ends_with_one_line_and_status_1(
    tiny_config: Callable[..., Config], other_job: subprocess.Popen[str], tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sidecache", "intrinsic", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"run is in use by `-c {tmp_path / 'run'}` (process {other_job.pid} on " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_job_releases_the_lock(other_job: subprocess.Popen[str], tmp_path: Path) -> None:
    other_job.send_signal(signal.SIGKILL)
    other_job.wait()
    with hold_run_dir(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".run.lock").read_text())["process"] == os.getpid()
    assert (tmp_path / "run" / ".run.lock").read_text() == ""


def test_readers_need_no_lock(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("methods=[linear_probe]", "train.epochs=1")
    sc.run(config)
    with hold_run_dir(config.run_dir):
        write_run_report(config.run_dir)
        print_results(config.run_dir)


def test_two_jobs_of_a_process_exclude_each_other_and_an_error_releases_the_lock(tmp_path: Path) -> None:
    def fail() -> None:
        with hold_run_dir(tmp_path / "run"), hold_run_dir(tmp_path / "run"):
            pass

    with pytest.raises(JobError, match=rf"is in use by `.*` \(process {os.getpid()} on "):
        fail()
    with hold_run_dir(tmp_path / "run"):
        pass


def test_leftovers_of_killed_writers_are_removed_except_the_reports(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for name in ("adaptors/a.safetensors", "search/s.json", "results.json", "report.html", "cache.zarr/zarr.json"):
        write_text(run_dir / f"{name}.0123.__lock", "half")
    with hold_run_dir(run_dir):
        left = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*.__lock")}
    assert left == {"report.html.0123.__lock", "cache.zarr/zarr.json.0123.__lock"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(JobError, match=r"the lock .*\.run\.lock cannot be opened"), hold_run_dir(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_system_without_locks_is_noted_and_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    noted = pytest.warns(Note, match="cannot be locked .No locks available.: make sure that no other job")
    with noted, hold_run_dir(tmp_path / "run"):
        pass


def test_a_run_dir_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"run_dir .* cannot be made \(.*\); choose another one")
    with refused, hold_run_dir(tmp_path / "file" / "run"):
        pass


def test_an_owner_that_cannot_be_read_is_another_job(tmp_path: Path) -> None:
    with hold_run_dir(tmp_path / "run"):
        for content in ("", "[]", "[" * 50_000, "{}"):
            (tmp_path / "run" / ".run.lock").write_text(content)
            with pytest.raises(JobError, match="is in use by another job; wait"), hold_run_dir(tmp_path / "run"):
                pass
