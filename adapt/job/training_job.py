"""Trains the methods of a configuration: chooses a trial of each on validation, then trains it from every seed.

Methods that train from features share each read of them: one pass trains the trials of all searches, another the chosen
trials of all methods from all seeds. Methods that train inside the backbone need a copy of it each, so each of their
trials is a pass.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.batch_unit import BatchUnit, ResolvePrecision, opened_for_units
from adapt.job.executor import Executor, InProcess
from adapt.job.feature_set import FeatureSet, Log, open_features
from adapt.job.inputs import Inputs
from adapt.job.intrinsic_dimension import Measurement, measure, resolve_targets
from adapt.job.intrinsic_record import IntrinsicRecord
from adapt.job.job_progress import job_progress
from adapt.job.method_search import MethodSearch, describe
from adapt.job.this_job import this_job
from adapt.job.trial_batch import TrialBatch, batches_of
from adapt.job.trial_run import TrialRun, TrialSpec, delete_checkpoints, read_rows
from adapt.methods.registry import find_method
from adapt.report.fingerprint import digest, features_digest
from adapt.run_dir.config_file import write_config
from adapt.run_dir.files import make_run_dir
from adapt.run_dir.job_record import write_job_record
from adapt.run_dir.results import Row, read_results
from adapt.training.callbacks import Callback
from adapt.training.candidate import diverged
from adapt.training.row_draw import RowDraw
from adapt.training.scores import Score
from adapt.training.trials import TrainingData, train_entries
from store.errors import JobError


def train(
    config: Config, inputs: Inputs, executor: Executor, log: Log = lambda _: None, callbacks: Sequence[Callback] = ()
) -> list[Row]:
    """Train every method of a configuration from every seed; finished trials are not trained again.

    Args:
        config: the configuration.
        inputs: its samples and backbone.
        executor: runs the passes.
        log: is called with one line for every choice.
        callbacks: follow the training; only if the executor is this process.

    Returns:
        all rows of the run directory.

    Raises:
        JobError: a method diverged from the start; the others are trained all the same.
    """
    prepare_run_dir(config)
    precision = executor.submit(ResolvePrecision(config.train.precision)).result()
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    features = open_features(config, inputs, log)
    _log_other_rows(config, features, log)
    with opened_for_units(config, features), ExitStack() as stack:
        if isinstance(executor, InProcess):
            callbacks = [*callbacks, stack.enter_context(job_progress(config))]
        TrainingJob(config=config, features=features, log=log, executor=executor, callbacks=callbacks).train_all()
    return read_results(config.run_dir)


def _log_other_rows(config: Config, features: FeatureSet, log: Log) -> None:
    """Say that the run directory has results of another backbone, or of other settings of it."""
    here = features_digest(features.provenance)
    others = [row for row in read_rows(config.run_dir) if row.conditions.get("features", "") != here]
    if others:
        log(
            f"note: {config.run_dir} holds {len(others)} results of another backbone or of other settings of it; they "
            "stay, and the tables name what differs. Set run_dir to keep them apart"
        )


def measure_intrinsic_dimension(
    config: Config, inputs: Inputs, block: int | None, dims: Sequence[int], log: Log = lambda _: None
) -> Measurement:
    """Measure the local intrinsic dimension of a block; finished points are not trained again.

    Args:
        config: the configuration.
        inputs: its samples and backbone.
        block: number of the block; None for the last one.
        dims: dimensions of the subspaces, ascending.
        log: is called with one line for every trained point.
    """
    prepare_run_dir(config)
    only_full = config.model_copy(update={"methods": ["full"]})  # needs the features of the last layer only
    features = open_features(only_full, inputs, log)
    job = TrainingJob(config=config, features=features, log=log, executor=InProcess(log, config.train.device))
    return job.measure(block, dims)


def prepare_run_dir(config: Config) -> None:
    """Create the run directory, and write the resolved configuration to it."""
    make_run_dir(config.run_dir)
    write_config(config)


_MEASURING = Lock()  # measuring trains in this process, where jobs of a study may run in several threads


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A configuration with its features.

    Args:
        config: the configuration.
        features: its features.
        log: is called with one line for every choice and every trained point.
        executor: runs the passes.
        callbacks: follow the training.
    """

    config: Config
    features: FeatureSet
    log: Log
    executor: Executor
    callbacks: Sequence[Callback] = ()

    def train_all(self) -> None:
        """Choose a trial of every method, and train it from every seed.

        Raises:
            JobError: a method diverged from the start; the others are trained all the same.
        """
        with _MEASURING:
            methods = [resolve_targets(method, self.measure, self.log) for method in self.config.parsed_methods()]
        from_features = [method for method in methods if not find_method(method.name).trains_backbone]
        end_to_end = [method for method in methods if find_method(method.name).trains_backbone]
        groups = [from_features, *([method] for method in end_to_end)]
        failures = self.executor.map(self._train_methods, [group for group in groups if group])
        for error in itertools.chain.from_iterable(failures):
            raise error

    def _train_methods(self, methods: Sequence[MethodConfig]) -> list[JobError]:
        """Train methods that share passes; returns the errors of those that diverged."""
        searches = [MethodSearch(self.config, self.features, method) for method in methods]
        while asked := [(search, specs) for search in searches if (specs := search.ask())]:
            self._score(asked)
        specs, failures = list[TrialSpec](), list[JobError]()
        for search in searches:
            try:
                specs += search.chosen(self.log)
            except JobError as error:
                failures.append(error)
        unfinished = [spec for spec in specs if not self._was_finished(spec)]
        if unfinished:
            write_job_record(self.config.run_dir, this_job(self.config.train.device))
        for batch, scores in self._run_all(batches_of(self.config, unfinished, for_search=False)):
            delete_checkpoints(batch.checkpoint(self.features))
            self._log_results(batch)
            out = [spec for spec, score in zip(batch.specs, scores, strict=True) if score.score == -math.inf]
            failures += [diverged([spec.trial.lr]) for spec in out]
        return failures

    def _log_results(self, batch: TrialBatch) -> None:
        """Log a line for every seed that was trained."""
        trained = {run.trial_id for run in batch.runs(self.features)}
        accuracy = "mean_class_accuracy" if self.config.train.class_weights == "balanced" else "top1"
        for row in read_rows(self.config.run_dir):
            if row.trial_id in trained:
                on_test = row.mean_average_precision if row.top1 is None else getattr(row, accuracy)
                scores = {"test": on_test, "validation": row.val_score}
                texts = [f"{score:.2f} on {rows}" for rows, score in scores.items() if score is not None]
                self.log(f"{row.method} seed {row.seed}: {', '.join(texts)}")

    def _score(self, asked: Sequence[tuple[MethodSearch, Sequence[TrialSpec]]]) -> None:
        """Train what several searches have asked for in as few passes as possible, and tell them the scores."""
        search_of = {id(spec): search for search, specs in asked for spec in specs}
        all_specs = [spec for _, specs in asked for spec in specs]
        for batch, scores in self._run_all(batches_of(self.config, all_specs, for_search=True)):
            told: dict[MethodSearch, list[tuple[TrialSpec, Score]]] = {}
            for spec, score in zip(batch.specs, scores, strict=True):
                told.setdefault(search_of[id(spec)], []).append((spec, score))
            for search, pairs in told.items():
                search.tell([spec for spec, _ in pairs], [score for _, score in pairs])
            delete_checkpoints(batch.checkpoint(self.features))

    def _run_all(self, batches: Sequence[TrialBatch]) -> Iterator[tuple[TrialBatch, list[Score]]]:
        """Every batch with its scores, as they are finished."""
        inputs = self.features.inputs
        units = [
            BatchUnit(
                batch=batch,
                own_source=inputs.own_source,
                own_backbone=inputs.own_backbone,
                callbacks=self.callbacks,
            )
            for batch in batches
        ]
        for unit, scores in self.executor.results(units):
            yield unit.batch, scores

    def _was_finished(self, spec: TrialSpec) -> bool:
        finished = TrialRun(config=self.config, features=self.features, spec=spec).is_finished
        if finished:
            self.log(f"{spec.method.name} seed {spec.seed}: finished before")
        return finished

    def measure(self, block: int | None = None, dims: Sequence[int] | None = None) -> Measurement:
        """Measure the local intrinsic dimension of a block.

        Args:
            block: number of the block; None for the last one.
            dims: dimensions of the subspaces, ascending; None, as `block`, for those of the last measurement in the run
                directory, which `sidecache intrinsic` may have made.
        """
        # scored on validation rows also where trials are trained on them in the end
        config = self.config.model_copy(update={"train": self.config.train.model_copy(update={"refit": False})})
        features = digest(self.features.provenance)
        record = IntrinsicRecord(config.run_dir, read_rows(config.run_dir))
        if dims is None:
            block, dims = record.last_measured(features)
        if block is None:
            block = self.features.facts.layers[-1]
        data = self.features.training_data(trains_backbone=True)

        def score(method: MethodConfig, trial: Trial) -> float:
            spec = TrialSpec(method=method, trial=trial, seed=config.train.seeds[0])
            run = TrialRun(config=config, features=self.features, spec=spec)
            found = record.find_score(run.trial_id)
            if found is None:
                found = self._score_alone(run, data)
                self.log(f"{method.name}: {found:.2f} on validation with {describe(trial)}")
                record.add_score(run, found)
            delete_checkpoints(_checkpoint_of_point(run))
            return found

        measurement = measure(config, data, score, block=block, dims=dims)
        record.save(features, measurement)
        return measurement

    def _score_alone(self, run: TrialRun, data: TrainingData) -> float:
        """Train a trial for its validation score."""
        [trained] = train_entries([run.entry()], data, RowDraw.of(run.config), _checkpoint_of_point(run))
        if trained.diverged:
            raise diverged([run.spec.trial.lr])
        return trained.score


def _checkpoint_of_point(run: TrialRun) -> Path:
    return run.config.run_dir / "checkpoints" / f"intrinsic-{run.trial_id}"
