"""Trains the methods of a configuration: chooses a trial on validation, then trains it from every seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.feature_set import FeatureSet, Log, open_features
from adapt.job.inputs import Inputs
from adapt.job.intrinsic_dimension import Measurement, entry_of, measure, resolve_targets
from adapt.job.intrinsic_record import IntrinsicRecord
from adapt.job.trial_run import TrialRun, delete_checkpoints, read_rows
from adapt.methods.registry import find_method
from adapt.report.fingerprint import digest
from adapt.run_dir.config_file import write_config
from adapt.run_dir.files import make_run_dir
from adapt.run_dir.results import Row, read_results
from adapt.training.loop import Settings
from adapt.training.make_search import make_search
from adapt.training.scores import Score
from adapt.training.trials import TrainingData, train_trials
from extract.forward.device import resolve_device, resolve_precision


def train(config: Config, inputs: Inputs, log: Log = lambda _: None) -> list[Row]:
    """Train every method of a configuration from every seed; finished trials are not trained again.

    Args:
        config: the configuration.
        inputs: its samples and backbone.
        log: is called with one line for every choice.

    Returns:
        all rows of the run directory.
    """
    prepare_run_dir(config)
    job = TrainingJob(config=config, features=open_features(config, inputs, log), log=log)
    for method in config.parsed_methods():
        job.train_method(method)
    return read_results(config.run_dir)


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
    job = TrainingJob(config=config, features=open_features(only_full, inputs, log), log=log)
    return job.measure(block, dims)


def prepare_run_dir(config: Config) -> None:
    """Create the run directory, and write the resolved configuration to it."""
    make_run_dir(config.run_dir)
    write_config(config)


def settings_of(config: Config, method: MethodConfig, seed: int) -> Settings:
    """The hyperparameters of a method that its trials share."""
    train, trains_backbone = config.train, find_method(method.name).trains_backbone
    return Settings(
        epochs=method.epochs,
        batch_size=method.batch_size,
        seed=seed,
        optimizer=train.optimizer,
        warmup=train.warmup,
        balance_classes=train.class_weights == "balanced",
        precision=resolve_precision(train.precision, resolve_device(train.device)),
        head_lr=train.head_lr,
        grad_accumulation=None if train.grad_accumulation == "auto" else train.grad_accumulation,
        grad_checkpointing=trains_backbone and train.grad_checkpointing,
        mixup=train.mixup if trains_backbone else 0.0,
        shuffle_block=train.shuffle_block,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A configuration with its features.

    Args:
        config: the configuration.
        features: its features.
        log: is called with one line for every choice and every trained point.
    """

    config: Config
    features: FeatureSet
    log: Log

    def train_method(self, method: MethodConfig) -> None:
        """Choose a trial of a method, and train it from every seed."""
        method = resolve_targets(method, self.measure, self.log)
        data = self._data_of(method)
        trial = self._choose_trial(method, data)
        for seed in self.config.train.seeds:
            run = self._trial_run(method, trial, data, seed)
            if run.is_finished:
                self.log(f"{method.name} seed {seed}: finished before")
            else:
                run.finish()

    def measure(self, block: int | None = None, dims: Sequence[int] | None = None) -> Measurement:
        """Measure the local intrinsic dimension of a block.

        Args:
            block: number of the block; None for the last one.
            dims: dimensions of the subspaces, ascending; None, as `block`, for those of the last measurement in the run
                directory, which `sidecache intrinsic` may have made.
        """
        config, features = self.config, digest(self.features.provenance)
        record = IntrinsicRecord(config.run_dir, read_rows(config.run_dir))
        if dims is None:
            block, dims = record.last_measured(features)
        if block is None:
            block = self.features.facts.layers[-1]
        data = self._data_of(entry_of(config, "full"))

        def score(method: MethodConfig, trial: Trial) -> float:
            run = self._trial_run(method, trial, data, config.train.seeds[0])
            checkpoint = config.run_dir / "checkpoints" / f"intrinsic-{run.trial_id}"
            found = record.find_score(run.trial_id)
            if found is None:
                found = run.train(checkpoint).best.score
                self.log(f"{method.name}: {found:.2f} on validation with {_describe(trial)}")
                record.add_score(run, found)
            delete_checkpoints(checkpoint)
            return found

        measurement = measure(config, data, score, block=block, dims=dims)
        record.save(features, measurement)
        return measurement

    def _trial_run(self, method: MethodConfig, trial: Trial, data: TrainingData, seed: int) -> TrialRun:
        settings = settings_of(self.config, method, seed)
        return TrialRun(
            config=self.config, features=self.features, data=data, method=method, trial=trial, settings=settings
        )

    def _data_of(self, method: MethodConfig) -> TrainingData:
        """What a method is trained from."""
        if find_method(method.name).trains_backbone:
            augment = self.config.train.augment == "crop_flip"
            return TrainingData(self.features.pooled, self.features.images(augment))
        return TrainingData(self.features.pooled)

    def _choose_trial(self, method: MethodConfig, data: TrainingData) -> Trial:
        """Search with the first seed; the scores are kept in the run directory."""
        run_dir, fraction = self.config.run_dir, self.config.data.val_fraction
        settings = settings_of(self.config, method, self.config.train.seeds[0])
        settings = replace(settings, epochs=self.config.search.epochs or settings.epochs)
        determining = (self.features.provenance, self.config.search, data.kind, method, settings, fraction)
        search_id = digest(*determining)

        def train_pass(trials: Sequence[Trial]) -> list[Score]:
            checkpoint = run_dir / "checkpoints" / f"search-{search_id}-{digest(trials)}"
            trained = train_trials(method, trials, data, settings, val_fraction=fraction, checkpoint=checkpoint)
            delete_checkpoints(checkpoint)
            return [
                Score(score=one.score, loss=one.loss, epoch=one.best_epoch, epochs=settings.epochs)
                for one in trained.candidates
            ]

        search = make_search(method, self.config.search, run_dir / "search" / f"{method.name}-{search_id}.json")
        while trials := search.ask():
            for group in _passes(method, trials):
                search.tell(group, train_pass(group))
        if len(method.trials) > 1:
            n_trials = len(search.points)  # more than the grid has if that was extended
            self.log(f"{method.name}: chose {_describe(search.best)} among {n_trials} on validation")
        return search.best


def _passes(method: MethodConfig, trials: list[Trial]) -> list[list[Trial]]:
    """Trials that are trained together: all of them, or one by one where each needs its own copy of the backbone."""
    return [[trial] for trial in trials] if find_method(method.name).trains_backbone else [trials]


def _describe(trial: Trial) -> str:
    options = ", ".join(f"{name}={value}" for name, value in trial.options.model_dump(mode="json").items())
    rate = "" if trial.lr is None else f"lr={trial.lr:g}, "
    return f"{rate}weight_decay={trial.weight_decay:g}, {options}"
