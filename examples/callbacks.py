"""Callbacks for MLflow and Weights & Biases; neither is a dependency of sidecache.

import sidecache as sc
from callbacks import MLflowCallback

sc.run(sc.load_config("pipeline.yaml"), callbacks=[MLflowCallback("my-experiment")])
"""

from typing import Any

from adapt.run_dir.results import Row
from adapt.training.callbacks import EpochEvent


def scalars_of(event: EpochEvent) -> dict[str, float]:
    return {f"{event.phase}/{name}": getattr(event, name) for name in ("train_loss", "val_score", "val_loss")}


def settings_of(trial: EpochEvent | Row) -> dict[str, Any]:
    return {"lr": trial.lr, "weight_decay": trial.weight_decay, "seed": trial.seed, **trial.options}


def metrics_of(row: Row) -> dict[str, float]:
    metrics = ("top1", "top5", "mean_class_accuracy", "macro_f1", "mean_average_precision")
    return {f"test/{name}": getattr(row, name) for name in metrics if getattr(row, name) is not None}


class MLflowCallback:
    """One MLflow run a trial: its settings, the scalars of every epoch, and the test metrics if it was chosen."""

    def __init__(self, experiment: str) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
        self._runs: dict[str, str] = {}

    def on_epoch(self, event: EpochEvent) -> None:
        for name, value in scalars_of(event).items():
            self._client.log_metric(self._run_of(event), name, value, step=event.epoch)

    def on_trial(self, row: Row) -> None:
        for name, value in metrics_of(row).items():
            self._client.log_metric(self._run_of(row), name, value)
        self._client.set_terminated(self._run_of(row))

    def _run_of(self, trial: EpochEvent | Row) -> str:
        settings = settings_of(trial)
        key = f"{trial.method} {settings}"
        if key not in self._runs:
            self._runs[key] = self._client.create_run(self._experiment, run_name=trial.method).info.run_id
            for name, value in settings.items():
                self._client.log_param(self._runs[key], name, value)
        return self._runs[key]


class WandbCallback:
    """One W&B run for each training of a chosen trial; the many short ones of the search are left out."""

    def __init__(self, project: str) -> None:
        self._project = project
        self._runs: dict[str, Any] = {}

    def on_epoch(self, event: EpochEvent) -> None:
        if event.phase == "final":
            self._run_of(event).log({"epoch": event.epoch, **scalars_of(event)})

    def on_trial(self, row: Row) -> None:
        run = self._run_of(row)
        run.summary.update(metrics_of(row))
        run.finish()

    def _run_of(self, trial: EpochEvent | Row) -> Any:
        import wandb

        settings = settings_of(trial)
        key = f"{trial.method} {settings}"
        if key not in self._runs:
            self._runs[key] = wandb.init(project=self._project, name=trial.method, config=settings, reinit="create_new")
        return self._runs[key]
