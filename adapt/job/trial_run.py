"""Identifies one trial of a method and seed, and records it: test metrics, adaptor, card, predictions and row."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from adapt.adaptors.card import Card
from adapt.adaptors.files import save_adaptor
from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.cost import break_even_epochs, inference_gflops
from adapt.job.feature_set import FeatureSet
from adapt.job.predictions_of_test import predictions_of
from adapt.methods.registry import find_method
from adapt.methods.trained_parameters import count_params
from adapt.report.fingerprint import conditions_of, digest
from adapt.run_dir.curves import Curve, write_curve
from adapt.run_dir.predictions import predictions_path, write_predictions
from adapt.run_dir.results import Row, read_results, write_results
from adapt.training.candidate import Candidate
from adapt.training.halving import Rung
from adapt.training.metrics import Metrics, evaluate
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry
from adapt.training.version import TRAINING_VERSION
from extract.config import BackboneConfig
from extract.forward.device import resolve_device, resolve_precision


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """A trial of a method, to be trained from one seed.

    Args:
        method: the method.
        trial: a point of its search space.
        seed: the seed.
        chosen_by: validation score by which the trial was chosen; None if it was the only one.
    """

    method: MethodConfig
    trial: Trial
    seed: int
    chosen_by: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A trial with the features of its job.

    Args:
        config: the configuration of the job.
        features: the features of the job.
        spec: the trial.
        for_search: whether only its validation score is wanted.
    """

    config: Config
    features: FeatureSet
    spec: TrialSpec
    for_search: bool = False

    @property
    def settings(self) -> Settings:
        """The hyperparameters that the trial shares with others."""
        return settings_of(self.config, self.spec.method, self.for_search)

    @property
    def trial_id(self) -> str:
        """A digest of everything that determines the result."""
        trained = (self.spec.method.name, self.spec.trial, self.spec.seed, self.settings)
        drawn = RowDraw.of(self.config, self.for_search)
        return digest(self.features.provenance, self._kind, *trained, drawn, TRAINING_VERSION)

    @property
    def is_finished(self) -> bool:
        """Whether row, adaptor, card and predictions exist; if one was deleted, the trial is trained again."""
        run_dir = self.config.run_dir
        rows = [row for row in read_rows(run_dir) if row.trial_id == self.trial_id]
        adaptors = [adaptor_path(run_dir, row) for row in rows]
        files = [*adaptors, *(path.with_suffix(".json") for path in adaptors)]
        return bool(rows) and all(path.exists() for path in [*files, *(predictions_path(run_dir, row) for row in rows)])

    def entry(self, rungs: tuple[Rung, ...] = ()) -> Entry:
        """The trial for training.

        Args:
            rungs: of successive halving among the trials of its method.
        """
        return Entry(
            method=self.spec.method.name,
            trial=self.spec.trial,
            seed=self.spec.seed,
            settings=self.settings,
            contest=digest(self.spec.method),
            rungs=rungs,
        )

    def record(
        self, trained: Candidate, logits: Float[Tensor, "samples classes"], peak_memory_bytes: int | None
    ) -> Row:
        """Write adaptor, card, predictions and row of the trained trial.

        Args:
            trained: the trained model.
            logits: of the test split, averaged over the views of a sample.
            peak_memory_bytes: of the pass that trained it.

        Returns:
            the row.
        """
        source = self.features.pooled.features
        labels = source.labels("test")[:: source.views]
        metrics = evaluate(logits, labels)
        row = self._row(trained, metrics, peak_memory_bytes)
        # adaptor and predictions first, so that no row is ever without them
        save_adaptor(adaptor_path(self.config.run_dir, row), trained.model, self._card(metrics))
        predictions = predictions_of(self.features, self.trial_id, logits)
        write_predictions(predictions_path(self.config.run_dir, row), predictions)
        write_results(self.config.run_dir, [row])
        return row

    def record_curve(self, trained: Candidate) -> None:
        """Write losses and scores of all epochs; nothing for a method that is solved."""
        if not trained.history:
            return
        train_loss, val_score, val_loss = (list(map(_finite, values)) for values in zip(*trained.history, strict=True))
        curve = Curve(
            trial_id=self.trial_id,
            method=self.spec.method.name,
            options=self._options,
            lr=self.spec.trial.lr,
            weight_decay=self.spec.trial.weight_decay,
            seed=self.spec.seed,
            train_loss=train_loss,
            val_score=val_score,
            val_loss=val_loss,
        )
        write_curve(self.config.run_dir, curve)

    def _row(self, trained: Candidate, metrics: Metrics, peak_memory_bytes: int | None) -> Row:
        costs, samples = self.features.costs, len(trained.data.rows)
        trainable_params, head_params = count_params(trained.model)
        seconds = trained.seconds / max(1, trained.epochs)
        return Row(
            trial_id=self.trial_id,
            method=self.spec.method.name,
            options=self._options,
            searched=self.spec.method.searched_options,
            seed=self.spec.seed,
            dataset=self.features.dataset,
            backbone=self.features.backbone_name,
            feature_source=self._kind,
            lr=self.spec.trial.lr,
            weight_decay=self.spec.trial.weight_decay,
            epochs=None if self.spec.trial.lr is None else self.spec.method.epochs,
            best_epoch=trained.best_epoch,
            val_score=self.spec.chosen_by if math.isnan(trained.score) else trained.score,
            **asdict(metrics),
            trainable_params=trainable_params,
            head_params=head_params,
            seconds_per_epoch=seconds,
            samples_per_second=samples / seconds if seconds else None,
            peak_memory_bytes=peak_memory_bytes,
            extract_seconds=costs.extract_seconds,
            store_bytes=costs.store_bytes,
            break_even_epochs=self._break_even_epochs(trained),
            inference_gflops=self._inference_gflops(),
            conditions=self._conditions(),
        )

    def _card(self, metrics: Metrics) -> Card:
        return Card(
            method=self.spec.method.name,
            options=self._options,
            metrics=asdict(metrics),
            train_precision=self.settings.precision,
            **{**dict(self.features.facts), "backbone": self._backbone_as_written()},
        )

    @property
    def _options(self) -> dict[str, Any]:
        return self.spec.trial.options.model_dump(mode="json")

    def _backbone_as_written(self) -> BackboneConfig:
        """The backbone with `${VARIABLE}` in the path of its weights, as the user wrote it; names stay as they are."""
        backbone = self.config.backbone
        if backbone.weights.startswith("hf-hub:"):
            return backbone
        return backbone.model_copy(update={"weights": self.config.as_written()["backbone"]["weights"]})

    def _break_even_epochs(self, trained: Candidate) -> float | None:
        """None for end-to-end methods, which do not train from the store."""
        costs = self.features.costs
        if self._trains_backbone or costs.extract_seconds is None or not costs.forward_seconds_per_sample:
            return None
        n_trained = len(trained.data.rows)
        n_read = n_trained + len(trained.data.val_rows)
        return break_even_epochs(
            costs.extract_seconds,
            online_seconds=costs.forward_seconds_per_sample * n_read,
            cached_seconds=trained.reading_seconds / max(1, trained.epochs) * n_read / n_trained,
        )

    def _inference_gflops(self) -> float | None:
        backbone, facts = self.features.shape, self.features.facts
        if backbone is None or facts.tokens != "all":
            return None
        layers, num_classes = facts.layers, len(facts.classes)
        return inference_gflops(self.spec.method.name, self.spec.trial.options, layers, num_classes, backbone=backbone)

    def _conditions(self) -> dict[str, Any]:
        name, row_draw = self.spec.method.name, RowDraw.of(self.config)
        return conditions_of(name, self.features.provenance, self._kind, settings=self.settings, row_draw=row_draw)

    @property
    def _trains_backbone(self) -> bool:
        return find_method(self.spec.method.name).trains_backbone

    @property
    def _kind(self) -> str:
        return self.features.kind(self._trains_backbone)


def settings_of(config: Config, method: MethodConfig, for_search: bool = False) -> Settings:
    """The hyperparameters of a method that its trials share."""
    train, trains_backbone = config.train, find_method(method.name).trains_backbone
    return Settings(
        epochs=(config.search.epochs if for_search else None) or method.epochs,
        batch_size=method.batch_size,
        optimizer=train.optimizer,
        warmup=train.warmup,
        balance_classes=train.class_weights == "balanced",
        precision=resolve_precision(train.precision, resolve_device(train.device)),
        head_lr=method.head_lr,
        grad_accumulation=None if train.grad_accumulation == "auto" else train.grad_accumulation,
        grad_checkpointing=trains_backbone and train.grad_checkpointing,
        mixup=train.mixup,
        feature_noise=0.0 if trains_backbone else train.feature_noise,
        label_smoothing=train.label_smoothing,
        keep=train.keep,
        solve_head=None if trains_backbone else train.solve_head,
        shuffle_block=train.shuffle_block,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def adaptor_path(run_dir: Path, row: Row) -> Path:
    """The adaptor file of a row."""
    return run_dir / "adaptors" / f"{row.file_stem}.safetensors"


def read_rows(run_dir: Path) -> list[Row]:
    """All rows of a run directory; none where no trial has finished yet."""
    return read_results(run_dir) if (run_dir / "results.json").exists() else []


def delete_checkpoints(checkpoint: Path) -> None:
    """Delete the checkpoint files of a pass."""
    for file in checkpoint.parent.glob(f"{checkpoint.name}*"):
        file.unlink()
