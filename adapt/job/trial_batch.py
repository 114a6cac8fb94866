"""Trains the trials of one pass: for the scores of a search, or for results, which are recorded at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapt.config.pipeline import Config
from adapt.job.cost import peak_memory
from adapt.job.feature_set import FeatureSet
from adapt.job.trial_run import TrialRun, TrialSpec
from adapt.methods.registry import find_method
from adapt.report.fingerprint import digest
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_split
from adapt.training.halving import Rung, rungs
from adapt.training.row_draw import RowDraw
from adapt.training.scores import Score
from adapt.training.trials import TrainingData, train_entries


@dataclass(frozen=True, kw_only=True)
class TrialBatch:
    """Trials that are trained together; it can be sent to another process.

    Args:
        config: the configuration of the job.
        specs: the trials. Those of methods that train inside the backbone come alone.
        for_search: whether their validation scores are all that is wanted; else they are tested and recorded.
    """

    config: Config
    specs: tuple[TrialSpec, ...]
    for_search: bool

    @property
    def trains_backbone(self) -> bool:
        """Whether the method trains inside the backbone."""
        return find_method(self.specs[0].method.name).trains_backbone

    def runs(self, features: FeatureSet) -> list[TrialRun]:
        """The trials with the features of the job."""
        return [
            TrialRun(config=self.config, features=features, spec=spec, for_search=self.for_search)
            for spec in self.specs
        ]

    def checkpoint(self, features: FeatureSet) -> Path:
        """The path without suffix of the state of the pass."""
        ids = [run.trial_id for run in self.runs(features)]
        kind = "search" if self.for_search else "trials"
        return self.config.run_dir / "checkpoints" / f"{kind}-{digest(ids)}"


def batches_of(config: Config, specs: Sequence[TrialSpec], for_search: bool) -> list[TrialBatch]:
    """Cut trials into batches: all that train from features, and each one that trains inside the backbone."""
    from_features = tuple(spec for spec in specs if not find_method(spec.method.name).trains_backbone)
    alone = [(spec,) for spec in specs if spec not in from_features]
    groups = [from_features, *alone] if from_features else alone
    return [TrialBatch(config=config, specs=group, for_search=for_search) for group in groups]


def run_batch(batch: TrialBatch, features: FeatureSet) -> list[Score]:
    """Train a batch; an interrupted pass resumes. Trials that diverged are not recorded.

    Returns:
        the validation score of every trial.
    """
    data, runs = features.training_data(batch.config, batch.trains_backbone), batch.runs(features)
    with peak_memory(data.inputs.device) as peak:
        candidates = train_entries(
            [run.entry(_rungs_of(batch, run)) for run in runs],
            data,
            RowDraw.of(batch.config, batch.for_search),
            checkpoint=batch.checkpoint(features),
        )
    if not batch.for_search:
        _record(runs, candidates, data, peak.n_bytes)
    return [Score(score=each.score, loss=each.loss, epoch=each.best_epoch, epochs=each.epochs) for each in candidates]


def _record(
    runs: Sequence[TrialRun], candidates: Sequence[Candidate], data: TrainingData, peak_memory_bytes: int | None
) -> None:
    """Evaluate on the test split, which nothing else reads, and write the results."""
    converged = [k for k, candidate in enumerate(candidates) if not candidate.diverged]
    precision = runs[0].settings.precision
    logits = predict_split([candidates[k] for k in converged], data.inputs, "test", precision) if converged else []
    for k, of_candidate in zip(converged, logits, strict=True):
        runs[k].record(candidates[k], of_candidate, peak_memory_bytes)


def _rungs_of(batch: TrialBatch, run: TrialRun) -> tuple[Rung, ...]:
    halving = batch.config.search.halving
    if halving is None or not batch.for_search:
        return ()
    return tuple(rungs(run.settings.epochs, halving.factor, halving.min_epochs))
