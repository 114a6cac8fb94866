"""Callbacks: TensorBoard's files hold every scalar, and the examples call MLflow and W&B as they are meant to."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from result_rows import make_row

from adapt.training.callbacks import Callback, EpochEvent

OPTIONS = {"rank": 4, "layers": [1, 3]}
WITHOUT_TENSORBOARD = "TensorBoard is optional: pip install 'sidecache[tensorboard]'"


def event(epoch: int = 1, **changes: Any) -> EpochEvent:
    fields: dict[str, Any] = {
        "method": "losa",
        "options": OPTIONS,
        "lr": 0.01,
        "last_lr": 0.01 / epoch,
        "weight_decay": 0.1,
        "seed": 0,
        "epoch": epoch,
        "train_loss": 1.0 / epoch,
        "val_score": 50.0 + epoch,
        "val_loss": 2.0 / epoch,
        "phase": "final",
    }
    return EpochEvent(**fields | changes)


ROW = make_row(options=OPTIONS, lr=0.01, weight_decay=0.1, best_epoch=2, top1=87.0)


class TestTensorBoard:
    @pytest.fixture
    def callback(self, tmp_path: Path) -> Any:
        pytest.importorskip("tensorboard", reason=WITHOUT_TENSORBOARD)
        from adapt.training.tensorboard import TensorBoardCallback

        return TensorBoardCallback(tmp_path)

    @staticmethod
    def scalars(run_dir: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Folder -> tag -> (step, value)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = {}
        for folder in sorted((run_dir / "tensorboard").iterdir()):
            read = EventAccumulator(str(folder)).Reload()
            found[folder.name] = {
                tag: [(scalar.step, scalar.value) for scalar in read.Scalars(tag)] for tag in read.Tags()["scalars"]
            }
        return found

    def test_every_scalar_of_a_trial_is_in_its_folder(self, callback: Any, tmp_path: Path) -> None:
        callback.on_epoch(event(1, phase="search"))
        for epoch in (1, 2):
            callback.on_epoch(event(epoch))
        callback.on_trial(ROW)
        ((name, tags),) = self.scalars(tmp_path).items()
        assert name.startswith("losa-seed0-")
        assert tags["final/train_loss"] == [(1, 1.0), (2, 0.5)]
        assert tags["final/val_score"] == [(1, 51.0), (2, 52.0)]
        assert tags["final/val_loss"] == [(1, 2.0), (2, 1.0)]
        assert tags["final/learning_rate"] == [(1, pytest.approx(0.01)), (2, pytest.approx(0.005))]
        assert tags["search/val_score"] == [(1, 51.0)]
        assert tags["test/top1"] == [(2, 87.0)]
        assert "test/top5" not in tags, "undefined"
        assert isinstance(callback, Callback)

    @pytest.mark.parametrize(
        "change", [{"lr": 0.02}, {"weight_decay": 0.2}, {"seed": 1}, {"options": {}}, {"method": "ladder"}]
    )
    def test_another_trial_has_another_folder(self, callback: Any, tmp_path: Path, change: dict[str, Any]) -> None:
        callback.on_epoch(event())
        callback.on_epoch(event(**change))
        callback.close()
        assert len(self.scalars(tmp_path)) == 2

    def test_what_was_written_is_there_without_closing(self, callback: Any, tmp_path: Path) -> None:
        callback.on_epoch(event(1))
        assert all(tags["final/val_score"] == [(1, 51.0)] for tags in self.scalars(tmp_path).values())
        callback.close()

    def test_a_solved_or_diverged_trial_is_written_too(self, callback: Any, tmp_path: Path) -> None:
        callback.on_epoch(event(lr=None, last_lr=None, train_loss=math.nan, val_loss=math.inf))
        callback.close()
        (tags,) = self.scalars(tmp_path).values()
        assert "final/learning_rate" not in tags
        assert math.isnan(tags["final/train_loss"][0][1])
        assert tags["final/val_loss"] == [(1, math.inf)]

    def test_any_number_of_trials_may_share_a_pass(
        self, callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("adapt.training.tensorboard._MOST_OPEN", 2)
        for epoch in (1, 2):
            for lr in (0.1, 0.2, 0.3):
                callback.on_epoch(event(epoch, lr=lr))
                assert len(callback._writers) <= 2
        callback.close()
        assert [len(tags["final/val_score"]) for tags in self.scalars(tmp_path).values()] == [2, 2, 2]


def load_examples() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "callbacks.py"
    spec = importlib.util.spec_from_file_location("example_callbacks", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def follow(callback: Callback) -> None:
    """One search and two trainings that share it, of two seeds."""
    assert isinstance(callback, Callback)
    callback.on_epoch(event(phase="search"))
    for seed in (0, 1):
        callback.on_epoch(event(1, seed=seed))
        callback.on_epoch(event(2, seed=seed))
        callback.on_trial(ROW.model_copy(update={"seed": seed}))


def test_the_mlflow_example_logs_one_run_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MagicMock()
    client = mlflow.MlflowClient.return_value
    client.create_run.side_effect = [MagicMock(**{"info.run_id": run}) for run in ("first", "second")]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    follow(load_examples().MLflowCallback("experiment"))
    logged = [(call.args, call.kwargs) for call in client.log_metric.call_args_list]
    assert (("second", "final/val_score", 52.0), {"step": 2}) in logged
    assert (("first", "search/val_score", 51.0), {"step": 1}) in logged
    assert (("first", "test/top1", 87.0), {}) in logged
    assert [call.args for call in client.set_terminated.call_args_list] == [("first",), ("second",)]


def test_the_wandb_example_logs_one_run_a_chosen_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, runs = MagicMock(), [MagicMock(), MagicMock()]
    wandb.init.side_effect = runs
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    follow(load_examples().WandbCallback("project"))
    for seed, run in enumerate(runs):
        assert wandb.init.call_args_list[seed].kwargs["config"] == {
            **OPTIONS,
            "lr": 0.01,
            "weight_decay": 0.1,
            "seed": seed,
        }
        assert [call.args[0]["epoch"] for call in run.log.call_args_list] == [1, 2]
        assert run.summary.update.call_args.args[0]["test/top1"] == 87.0
        run.finish.assert_called_once_with()
