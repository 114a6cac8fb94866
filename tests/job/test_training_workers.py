"""Training in workers gives the rows of training in this process, and a dead worker costs its trial in flight alone."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.run_dir.predictions import predictions_path, read_predictions
from adapt.run_dir.results import Row
from store.errors import UserError

MakeConfig = Callable[..., Config]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # sockets of killed processes
METHODS = (
    "methods=[{name: linear_probe, sweep: {weight_decay: [0.1, 0.01]}}, {name: losa, rank: 4, token_rank: 2}, "
    "{name: bitfit, sweep: {lr: [0.01, 0.001]}}, {name: lora, rank: 2}]"
)
# what another run measures differently
MEASURED = {
    "seconds_per_epoch",
    "samples_per_second",
    "peak_memory_bytes",
    "extract_seconds",
    "break_even_epochs",
    "store_bytes",
}


def values(row: Row) -> dict[str, Any]:
    return row.model_dump(exclude=MEASURED)


@pytest.mark.parametrize("splits", ["[train, test]", "[train]"])
def test_the_table_is_the_same_for_any_number_of_workers(tiny_config: MakeConfig, tmp_path: Path, splits: str) -> None:
    options = (METHODS, "train.seeds=[0, 1]", "train.epochs=2", f"store.splits={splits}")
    one = tiny_config(*options)
    rows = sc.run(one)
    two = tiny_config(*options, "train.workers=2", f"run_dir={tmp_path / 'two'}")
    again = sc.train(two)
    assert len(rows) == 8
    assert [values(row) for row in again] == [values(row) for row in rows]
    for row in rows:
        mine, theirs = (read_predictions(predictions_path(config.run_dir, row)) for config in (one, two))
        assert (mine.logits == theirs.logits).all()
    assert (one.run_dir / "search").exists()
    names = [sorted(path.name for path in (config.run_dir / "search").iterdir()) for config in (one, two)]
    assert names[0] == names[1]


def test_a_worker_that_dies_costs_its_trial_in_flight(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("methods=[bitfit, lora]", "train.seeds=[0, 1]", "train.epochs=30", "train.workers=2")
    sc.extract(config)
    killed: list[int] = []

    def kill_one(_: Any) -> None:
        """Kill a worker once it has written its first row."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (config.run_dir / "results.json").exists():
            time.sleep(0.05)
        workers = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        killed.append(workers[-1].pid)
        os.kill(workers[-1].pid, 9)

    thread = Thread(target=kill_one, args=(None,))
    thread.start()
    rows = sc.train(config)
    thread.join()
    assert len(killed) == 1
    assert [(row.method, row.seed) for row in rows] == [("bitfit", 0), ("bitfit", 1), ("lora", 0), ("lora", 1)]


def test_callbacks_are_refused_where_others_train(tiny_config: MakeConfig) -> None:
    class Nothing:
        def on_epoch(self, event: Any) -> None: ...

        def on_trial(self, row: Any) -> None: ...

    with pytest.raises(UserError, match=r"^callbacks are called in this process, but train\.workers"):
        sc.train(tiny_config("train.workers=2"), callbacks=[Nothing()])
