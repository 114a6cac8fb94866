"""Trains the trials of one pass: for the scores of a search, or for results, which are recorded at once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapt.config.pipeline import Config
from adapt.job.cost import PeakMemory, peak_memory
from adapt.job.feature_set import FeatureSet
from adapt.job.trial_run import TrialRun, TrialSpec
from adapt.methods.registry import find_method
from adapt.report.fingerprint import digest
from adapt.run_dir.results import Row
from adapt.training.callbacks import Callback, EpochEvent, Phase
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_split
from adapt.training.halving import Rung, rungs
from adapt.training.row_draw import RowDraw
from adapt.training.scores import Score
from adapt.training.trials import TrainingData, epoch_event, train_entries


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

    @property
    def name(self) -> str:
        """The methods and seeds, for messages."""
        methods = ", ".join(dict.fromkeys(spec.method.name for spec in self.specs))
        seeds = ", ".join(map(str, dict.fromkeys(spec.seed for spec in self.specs)))
        return f"{self.config.run_dir.name}: {methods} seed {seeds}"

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


def run_batch(batch: TrialBatch, features: FeatureSet, callbacks: Sequence[Callback] = ()) -> list[Score]:
    """Train a batch; an interrupted pass resumes. Trials that diverged are not recorded.

    Args:
        batch: the trials.
        features: the features of their job.
        callbacks: follow the training, besides that of `train.tensorboard`.

    Returns:
        the validation score of every trial.
    """
    data, runs = features.training_data(batch.trains_backbone), batch.runs(features)
    with ExitStack() as stack:
        followers = [*callbacks, *_tensorboard(batch.config, stack)]
        phase: Phase = "search" if batch.for_search else "final"
        with peak_memory(data.inputs.device) as peak:
            candidates = train_entries(
                [run.entry(_rungs_of(batch, run)) for run in runs],
                data,
                RowDraw.of(batch.config, batch.for_search),
                checkpoint=batch.checkpoint(features),
                on_epoch=lambda entry, candidate: _notify(followers, epoch_event(entry, candidate, phase)),
            )
        for run, candidate in zip(runs, candidates, strict=True):
            run.record_curve(candidate)
        if not batch.for_search:
            for row in _record(runs, candidates, data, peak):
                for follower in followers:
                    follower.on_trial(row)
    return [_score_of(candidate, run.settings.epochs) for run, candidate in zip(runs, candidates, strict=True)]


def _score_of(candidate: Candidate, epochs: int) -> Score:
    """A candidate that diverged late counts as trained to the end: its best epoch may be the best of all."""
    trained_for = candidate.epochs if candidate.was_dropped else epochs
    return Score(score=candidate.score, loss=candidate.loss, epoch=candidate.best_epoch, epochs=trained_for)


def _record(
    runs: Sequence[TrialRun], candidates: Sequence[Candidate], data: TrainingData, peak: PeakMemory
) -> Iterator[Row]:
    """Evaluate on the test split, which nothing else reads, and write the results of every trial."""
    converged = [k for k, candidate in enumerate(candidates) if not candidate.diverged]
    precision = runs[0].settings.precision
    logits = predict_split([candidates[k] for k in converged], data.inputs, "test", precision) if converged else []
    for k, of_candidate in zip(converged, logits, strict=True):
        yield runs[k].record(candidates[k], of_candidate, peak.n_bytes)


def _notify(followers: Sequence[Callback], event: EpochEvent) -> None:
    for follower in followers:
        follower.on_epoch(event)


def _tensorboard(config: Config, stack: ExitStack) -> list[Callback]:
    """The callback of `train.tensorboard`, closed with the stack."""
    if not config.train.tensorboard:
        return []
    from adapt.training.tensorboard import TensorBoardCallback  # an optional dependency

    callback = TensorBoardCallback(config.run_dir)
    stack.callback(callback.close)
    return [callback]


def _rungs_of(batch: TrialBatch, run: TrialRun) -> tuple[Rung, ...]:
    halving = batch.config.train.halving
    if halving is None or not batch.for_search:
        return ()
    return tuple(rungs(run.settings.epochs, halving.factor, halving.min_epochs))
