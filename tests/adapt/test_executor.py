"""Units of training run in this process, or in workers; one that fails or ends its worker costs no other unit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster
from training_units import Deadly, Failing, Hanging, Noted, Square, Unpicklable

from adapt.config.pipeline import TrainConfig
from adapt.job.executor import Executor, InProcess, Log, open_executor
from adapt.training.distributed import World
from store.errors import JobError, UserError

ROOT = Path(__file__).parents[2]
by_dask = pytest.mark.filterwarnings("default")  # sockets of killed processes


@dataclass(frozen=True)
class Workers:
    """An executor on two workers of this machine, and the lines that its units logged."""

    executor: Executor
    lines: list[str]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Workers that count as hung after some seconds."""
    lines: list[str] = []
    with open_executor(TrainConfig(workers=2, trial_seconds=6.0, device="cpu"), lines.append) as executor:
        yield Workers(executor, lines)


def squares(executor: Executor, numbers: range) -> list[Any]:
    return [future.result() for future in [executor.submit(Square(number)) for number in numbers]]


# in this process


def test_one_worker_is_this_process() -> None:
    lines: list[str] = []
    with open_executor(TrainConfig(device="cpu"), lines.append) as executor:
        results = squares(executor, range(3))
    assert [(result["square"], result["process"]) for result in results] == [(k * k, os.getpid()) for k in range(3)]
    assert lines == ["square 0 on cpu", "square 1 on cpu", "square 2 on cpu"]


@pytest.mark.parametrize(("error", "kind"), [("user", UserError), ("job", JobError), ("other", KeyError)])
def test_an_error_in_this_process_is_raised_by_its_future_alone(
    error: str, kind: type[Exception], tmp_path: Path
) -> None:
    executor = InProcess(print, "cpu")
    failed = executor.submit(Failing(error, tmp_path / "starts"))
    assert executor.submit(Square(3)).result()["square"] == 9
    with pytest.raises(kind):
        failed.result()


def test_units_of_several_threads_take_turns_in_this_process() -> None:
    @dataclass
    class Alone:
        name: str = "unit"
        running: list[int] = field(default_factory=list)
        seen: list[int] = field(default_factory=list)

        def run(self, log: Log, device: str) -> None:
            self.running.append(1)
            time.sleep(0.001)
            self.seen.append(len(self.running))
            self.running.pop()

    executor, unit = InProcess(print, "cpu"), Alone()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(executor.submit, [unit] * 40))
    assert unit.seen == [1] * 40


def test_an_interrupt_in_this_process_is_not_kept_in_a_future() -> None:
    class Interrupted:
        name = "unit"

        def run(self, log: Log, device: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcess(print, "cpu").submit(Interrupted())


def test_workers_below_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapt.job.executor.world", lambda: World(rank=0, size=2))
    with pytest.raises(UserError, match=r"torchrun has started 2 processes.*use one or the other"):  # noqa: SIM117
        with open_executor(TrainConfig(workers=2), print):
            pass


# on workers


@pytest.mark.slow
@by_dask
def test_results_and_lines_come_back_from_other_processes(workers: Workers) -> None:
    results = squares(workers.executor, range(100, 120))
    assert [result["square"] for result in results] == [k * k for k in range(100, 120)]
    assert os.getpid() not in {result["process"] for result in results}
    assert {result["threads"] for result in results} == {max(1, (os.cpu_count() or 1) // 2)}
    assert sorted(line for line in workers.lines if line.startswith("square 1")) == [
        f"square {k} on cpu" for k in range(100, 120)
    ]


@pytest.mark.slow
@by_dask
def test_many_threads_may_submit(workers: Workers) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda k: workers.executor.submit(Square(k)).result(), range(200, 264)))
    assert [result["square"] for result in results] == [k * k for k in range(200, 264)]


@pytest.mark.slow
@by_dask
def test_units_of_the_first_parts_of_a_study_start_before_those_that_wait_for_later_ones(
    workers: Workers, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    last, first = workers.executor.for_part(1), workers.executor.for_part(0)
    submitted = [last.submit(Noted("last", starts)) for _ in range(12)]
    submitted += [first.submit(Noted("first", starts)) for _ in range(4)]
    for future in submitted:
        future.result()
    order = starts.read_text().split()
    assert sorted(order) == ["first"] * 4 + ["last"] * 12
    assert order[-6:] == ["last"] * 6


@pytest.mark.slow
@by_dask
def test_a_unit_whose_worker_dies_is_started_again(workers: Workers, tmp_path: Path) -> None:
    deadly, others = workers.executor.submit(Deadly(1, tmp_path / "starts")), squares(workers.executor, range(6))
    assert deadly.result() == 2
    assert [result["square"] for result in others] == [k * k for k in range(6)]


@pytest.mark.slow
@by_dask
def test_a_unit_that_ends_every_worker_fails_and_the_others_go_on(workers: Workers, tmp_path: Path) -> None:
    deadly, others = workers.executor.submit(Deadly(99, tmp_path / "starts")), squares(workers.executor, range(6))
    with pytest.raises(JobError, match=r"^deadly unit was started 4 times, .* and train\.trial_seconds$"):
        deadly.result()
    assert len(list((tmp_path / "starts").iterdir())) == 4
    assert [result["square"] for result in others] == [k * k for k in range(6)]


@pytest.mark.slow
@by_dask
def test_a_hung_unit_is_started_again_and_fails_if_it_always_hangs(workers: Workers, tmp_path: Path) -> None:
    once, always = Hanging(1, tmp_path / "once"), Hanging(99, tmp_path / "always")
    first = workers.executor.submit(once)
    assert first.result() == 2
    second, others = workers.executor.submit(always), squares(workers.executor, range(6))
    with pytest.raises(JobError, match=r"^hanging unit was started 4 times, .* made no progress for 6 s"):
        second.result()
    assert len(list((tmp_path / "always").iterdir())) == 4
    assert [result["square"] for result in others] == [k * k for k in range(6)]
    assert squares(workers.executor, range(2))[1]["square"] == 1


@pytest.mark.slow
@by_dask
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("user", UserError, "^the folder is empty$"),
        ("job", JobError, "^diverged$"),
        ("other", JobError, "^unit other failed: KeyError: 'head'$"),
    ],
)
def test_an_error_of_a_unit_is_final_and_raised_by_its_future(
    error: str, kind: type[Exception], message: str, workers: Workers, tmp_path: Path
) -> None:
    failed, other = workers.executor.submit(Failing(error, tmp_path / "starts")), workers.executor.submit(Square(3))
    with pytest.raises(kind, match=message):
        failed.result()
    assert len(list((tmp_path / "starts").iterdir())) == 1
    assert other.result()["square"] == 9


@pytest.mark.slow
@by_dask
def test_a_unit_that_cannot_be_pickled_is_refused_at_once(workers: Workers) -> None:
    with pytest.raises(UserError, match=r"cannot be sent to other processes.*leave train\.workers at 1"):
        workers.executor.submit(Unpicklable())


@pytest.mark.slow
@by_dask
def test_a_running_scheduler_serves_jobs_and_what_is_not_finished_is_canceled(tmp_path: Path) -> None:
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, threads_per_worker=2, **here) as cluster:
        train = TrainConfig(scheduler=cluster.scheduler_address, workers=2, device="cpu")
        with open_executor(train, print) as executor:
            assert [result["square"] for result in squares(executor, range(9))] == [k * k for k in range(9)]
        with open_executor(train, print) as executor:
            left = executor.submit(Hanging(1, tmp_path / "starts"))
        with pytest.raises(CancelledError):
            left.result()
        with pytest.raises(RuntimeError, match="closed"):
            executor.submit(Square(1))


@pytest.mark.slow
@by_dask
def test_without_its_scheduler_every_unit_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
    file = tmp_path / "scheduler.json"
    process = subprocess.Popen([*command, "--port", "0", "--scheduler-file", str(file)], stderr=subprocess.DEVNULL)
    try:
        while not file.exists() or not file.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        train = TrainConfig(scheduler=json.loads(file.read_text())["address"], device="cpu")
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", str(train.scheduler), "--nthreads", "1"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.DEVNULL,
        )
        try:
            with open_executor(train, print) as executor:
                assert executor.submit(Square(2)).result()["square"] == 4
                hanging = executor.submit(Hanging(1, tmp_path / "starts"))
                while not (tmp_path / "starts").exists():
                    assert worker.poll() is None
                    time.sleep(0.05)
                process.kill()
                with pytest.raises(JobError, match="hanging unit failed"):
                    hanging.result()
        finally:
            worker.terminate()
            worker.wait()
    finally:
        process.kill()
        process.wait()


JOB = """
import sys
from pathlib import Path
from training_units import Hanging
from adapt.config.pipeline import TrainConfig
from adapt.job.executor import open_executor

if __name__ == "__main__":
    with open_executor(TrainConfig(workers=2, device="cpu"), print) as executor:
        futures = [executor.submit(Hanging(1, Path(f"starts{k}"))) for k in range(4)]
        [future.result() for future in futures]
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_job_and_all_its_processes(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    process = subprocess.Popen(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(tmp_path.glob("starts*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        _, errors = process.communicate(timeout=240)  # a busy machine is no failure
    finally:
        process.kill()
    assert process.returncode in (1, 130, -signal.SIGINT), errors
    assert "KeyboardInterrupt" in errors
    _, living = psutil.wait_procs(started, timeout=20)
    assert not living
