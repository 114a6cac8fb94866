"""Trains one trial from one seed, evaluates it on the test split, and writes its adaptor and its row of results."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapt.adaptor import Card, save_adaptor
from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.cost import break_even_epochs, inference_gflops, peak_memory
from adapt.job.feature_set import FeatureSet
from adapt.methods.trained_parameters import count_params
from adapt.report.fingerprint import conditions_of, digest
from adapt.run_dir.results import Row, read_results, write_results
from adapt.training.loop import Settings, evaluate_split
from adapt.training.metrics import Metrics
from adapt.training.trials import Trained, TrainingData, train_trials
from extract.config import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One trial of a method, to be trained from one seed.

    Args:
        config: the configuration of the job.
        features: the features of the job.
        data: what the method is trained from.
        method: the method.
        trial: a point of its grid.
        settings: hyperparameters, seed included.
    """

    config: Config
    features: FeatureSet
    data: TrainingData
    method: MethodConfig
    trial: Trial
    settings: Settings

    @property
    def trial_id(self) -> str:
        """A digest of everything that determines the result."""
        data, method, fraction = self.data.kind, self.method.name, self.config.data.val_fraction
        determining = (self.features.provenance, data, method, self.trial, self.settings, fraction)
        return digest(*determining)

    @property
    def is_finished(self) -> bool:
        """Whether row, adaptor and card exist; if one of them was deleted, the trial is trained again."""
        run_dir = self.config.run_dir
        paths = [adaptor_path(run_dir, row) for row in read_rows(run_dir) if row.trial_id == self.trial_id]
        return any(path.exists() and path.with_suffix(".json").exists() for path in paths)

    def train(self, checkpoint: Path) -> Trained:
        """Train the trial; an interrupted one resumes from its checkpoint."""
        fraction = self.config.data.val_fraction
        return train_trials(
            self.method, [self.trial], self.data, self.settings, val_fraction=fraction, checkpoint=checkpoint
        )

    def finish(self) -> None:
        """Train the trial, evaluate it on the test split, and write adaptor, card and row."""
        checkpoint = self.config.run_dir / "checkpoints" / self.trial_id
        with peak_memory(self.data.inputs.device) as peak:
            trained = self.train(checkpoint)
        best = trained.best
        # the only read of the test split
        metrics = evaluate_split(best.model, self.data.inputs, "test", self.settings.precision)
        row = self._row(trained, metrics, peak.n_bytes)
        # the adaptor first, so that no row is ever without one
        save_adaptor(adaptor_path(self.config.run_dir, row), best.model, self._card(metrics))
        write_results(self.config.run_dir, [row])
        delete_checkpoints(checkpoint)

    def _row(self, trained: Trained, metrics: Metrics, peak_memory_bytes: int | None) -> Row:
        best, costs = trained.best, self.features.costs
        trainable_params, head_params = count_params(best.model)
        return Row(
            trial_id=self.trial_id,
            method=self.method.name,
            options=self._options,
            seed=self.settings.seed,
            dataset=self.features.dataset,
            backbone=self.features.backbone_name,
            feature_source=self.data.kind,
            lr=self.trial.lr,
            weight_decay=self.trial.weight_decay,
            epochs=None if self.trial.lr is None else self.method.epochs,
            best_epoch=best.best_epoch,
            val_score=best.score,
            **asdict(metrics),
            trainable_params=trainable_params,
            head_params=head_params,
            seconds_per_epoch=trained.seconds_per_epoch,
            samples_per_second=trained.samples_per_second,
            peak_memory_bytes=peak_memory_bytes,
            extract_seconds=costs.extract_seconds,
            store_bytes=costs.store_bytes,
            break_even_epochs=self._break_even_epochs(trained),
            inference_gflops=self._inference_gflops(),
            conditions=self._conditions(),
        )

    def _card(self, metrics: Metrics) -> Card:
        return Card(
            method=self.method.name,
            options=self._options,
            metrics=asdict(metrics),
            train_precision=self.settings.precision,
            **{**dict(self.features.facts), "backbone": self._backbone_as_written()},
        )

    @property
    def _options(self) -> dict[str, Any]:
        return self.trial.options.model_dump(mode="json")

    def _backbone_as_written(self) -> BackboneConfig:
        """The backbone with `${VARIABLE}` in the path of its weights, as the user wrote it; names stay as they are."""
        backbone = self.config.backbone
        if backbone.weights.startswith("hf-hub:"):
            return backbone
        return backbone.model_copy(update={"weights": self.config.as_written()["backbone"]["weights"]})

    def _break_even_epochs(self, trained: Trained) -> float | None:
        """None for end-to-end methods, which do not train from the store."""
        costs = self.features.costs
        if self.data.images or costs.extract_seconds is None or costs.forward_seconds is None:
            return None
        samples_per_epoch = round(trained.samples_per_second * trained.seconds_per_epoch)
        return break_even_epochs(costs.extract_seconds, costs.forward_seconds, costs.forward_samples, samples_per_epoch)

    def _inference_gflops(self) -> float | None:
        backbone, facts = self.features.shape, self.features.facts
        if backbone is None or facts.tokens != "all":
            return None
        layers, num_classes = facts.layers, len(facts.classes)
        return inference_gflops(self.method.name, self.trial.options, layers, num_classes, backbone=backbone)

    def _conditions(self) -> dict[str, Any]:
        name, fraction = self.method.name, self.config.data.val_fraction
        return conditions_of(name, self.features.provenance, self.data.kind, self.settings, val_fraction=fraction)


def adaptor_path(run_dir: Path, row: Row) -> Path:
    """The adaptor file of a row."""
    return run_dir / "adaptors" / f"{row.method}-seed{row.seed}-{row.trial_id[:8]}.safetensors"


def read_rows(run_dir: Path) -> list[Row]:
    """All rows of a run directory; none where no trial has finished yet."""
    return read_results(run_dir) if (run_dir / "results.json").exists() else []


def delete_checkpoints(checkpoint: Path) -> None:
    """Delete the checkpoint files of a pass."""
    for file in checkpoint.parent.glob(f"{checkpoint.name}*"):
        file.unlink()
