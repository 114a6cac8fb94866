"""The training job: for every method, choose on validation, train every seed, touch the test split once."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapt.adaptor import Card, save_adaptor
from adapt.config.pipeline import Config, MethodConfig, Trial
from adapt.job.cost import break_even_epochs, inference_gflops, peak_memory
from adapt.job.feature_set import Costs, Inputs, Origin, Say, open_origin
from adapt.job.intrinsic_dimension import Measurement, Record, entry_of, measure, resolve_targets
from adapt.methods.registry import find_method
from adapt.methods.trained_parameters import count_params
from adapt.report.fingerprint import conditions_of, digest
from adapt.run_dir.config_file import write_config
from adapt.run_dir.files import make_run_dir
from adapt.run_dir.results import Row, read_results, write_results
from adapt.training.loop import Settings, evaluate_split
from adapt.training.search import Material, Trained, choose_trial, read_points, train_trials
from extract.config import BackboneConfig
from extract.forward.device import resolve_device, resolve_precision


def train(config: Config, inputs: Inputs, say: Say = lambda _: None) -> list[Row]:
    """Train every method of a configuration for every seed; trials that are done are not run again."""
    prepare_run_dir(config)
    origin = open_origin(config, inputs, say)
    for method in config.parsed_methods():
        _train_method(method, config, origin, say)
    return read_results(config.run_dir)


def measure_intrinsic_dimension(
    config: Config, inputs: Inputs, block: int | None, dims: Sequence[int], say: Say = lambda _: None
) -> Measurement:
    """Measure the local intrinsic dimension of a block (None: the last one); points that are done are kept."""
    prepare_run_dir(config)
    lean = config.model_copy(update={"methods": ["full"]})  # no other features than those of the last layer
    return _measure(config, open_origin(lean, inputs, say), say, block, dims)


def prepare_run_dir(config: Config) -> None:
    """Make the run directory and keep the resolved configuration in it."""
    make_run_dir(config.run_dir)
    write_config(config)


def settings_of(config: Config, method: MethodConfig, seed: int) -> Settings:
    """How a method is trained from a seed."""
    train, trains_backbone = config.train, find_method(method.name).trains_backbone
    return Settings(
        method.epochs,
        method.batch_size,
        seed,
        train.optimizer,
        train.warmup,
        train.class_weights == "balanced",
        precision=resolve_precision(train.precision, resolve_device(train.device)),
        head_lr=train.head_lr,
        grad_accumulation=None if train.grad_accumulation == "auto" else train.grad_accumulation,
        grad_checkpointing=trains_backbone and train.grad_checkpointing,
        mixup=train.mixup if trains_backbone else 0.0,
        shuffle_block=train.shuffle_block,
    )


def _train_method(method: MethodConfig, config: Config, origin: Origin, say: Say) -> None:
    method = resolve_targets(method, lambda: _measure(config, origin, say), say)
    material = _material(method, config, origin)
    trial = _choose(method, config, origin, material, say)
    for seed in config.train.seeds:
        settings = settings_of(config, method, seed)
        trial_id = _trial_id(method, trial, config, origin, material, settings)
        if _is_finished(config.run_dir, trial_id):
            say(f"{method.name} seed {seed}: done before")
            continue
        _train_seed(trial_id, method, trial, config, origin, material, settings)


def _measure(
    config: Config, origin: Origin, say: Say, block: int | None = None, dims: Sequence[int] | None = None
) -> Measurement:
    """Without `dims`: the last measurement of the run directory, which `sidecache intrinsic` may have made."""
    record, features = Record(config.run_dir, _rows(config.run_dir)), digest(origin.identity)
    if dims is None:
        block, dims = record.asked(features)
    material = _material(entry_of(config, "full"), config, origin)

    def score(method: MethodConfig, trial: Trial) -> float:
        settings = settings_of(config, method, config.train.seeds[0])
        trial_id = _trial_id(method, trial, config, origin, material, settings)
        checkpoint = config.run_dir / "checkpoints" / f"intrinsic-{trial_id}"

        def train() -> float:
            trained = train_trials(method, [trial], material, settings, config.data.val_fraction, checkpoint)
            best = trained.best.score
            say(f"{method.name}: {best:.2f} on validation with {_describe(trial)}")
            return best

        value = record.score(trial_id, method, trial, train)
        _delete_checkpoints(checkpoint)
        return value

    measurement = measure(config, material, score, origin.facts.layers[-1] if block is None else block, dims)
    record.keep(features, measurement)
    return measurement


def _material(method: MethodConfig, config: Config, origin: Origin) -> Material:
    trains_backbone = find_method(method.name).trains_backbone
    return Material(origin.pooled, origin.images(config.train.augment == "crop_flip") if trains_backbone else None)


def _choose(method: MethodConfig, config: Config, origin: Origin, material: Material, say: Say) -> Trial:
    """Search with the first seed; the outcome is kept in the run directory."""
    settings, fraction = settings_of(config, method, config.train.seeds[0]), config.data.val_fraction
    settings = replace(settings, epochs=config.train.search_epochs or settings.epochs)
    search_id = digest(origin.identity, material.kind, method, settings, fraction)

    def run(trials: Sequence[Trial], name: str) -> Trained:
        checkpoint = config.run_dir / "checkpoints" / f"search-{search_id}-{name}"
        trained = train_trials(method, trials, material, settings, fraction, checkpoint)
        _delete_checkpoints(checkpoint)
        return trained

    kept = config.run_dir / "search" / f"{method.name}-{search_id}.json"
    trial = choose_trial(method, run, kept)
    if len(method.trials) > 1:
        n_tried = len(read_points(kept))  # more than the grid has where that was widened
        say(f"{method.name}: chose {_describe(trial)} among {n_tried} on validation")
    return trial


def _train_seed(
    trial_id: str,
    method: MethodConfig,
    trial: Trial,
    config: Config,
    origin: Origin,
    material: Material,
    settings: Settings,
) -> None:
    inputs, file = material.inputs, config.run_dir / "checkpoints" / trial_id
    with peak_memory(inputs.device) as peak:
        trained = train_trials(method, [trial], material, settings, config.data.val_fraction, file)
    best, costs = trained.best, origin.costs
    metrics = asdict(evaluate_split(best.model, inputs, "test", settings.precision))
    parameters, head = count_params(best.model)
    options = trial.options.model_dump(mode="json")
    row = Row(
        trial_id=trial_id,
        method=method.name,
        options=options,
        seed=settings.seed,
        dataset=origin.dataset,
        backbone=origin.backbone_name,
        feature_source=inputs.kind,
        lr=trial.lr,
        weight_decay=trial.weight_decay,
        epochs=None if trial.lr is None else method.epochs,
        best_epoch=best.best_epoch,
        val_score=best.score,
        **metrics,
        trainable_params=parameters,
        head_params=head,
        seconds_per_epoch=trained.seconds_per_epoch,
        samples_per_second=trained.samples_per_second,
        peak_memory_bytes=peak.n_bytes,
        extract_seconds=costs.extract_seconds,
        store_bytes=costs.store_bytes,
        break_even_epochs=None if material.images else _break_even(costs, trained),
        inference_gflops=_gflops(method.name, trial, origin),
        conditions=_conditions(method, config, origin, material, settings),
    )
    card = Card(
        method=method.name,
        options=options,
        metrics=metrics,
        train_precision=settings.precision,
        **{**dict(origin.facts), "backbone": _backbone_of_card(config)},
    )
    save_adaptor(adaptor_path(config.run_dir, row), best.model, card)
    write_results(config.run_dir, [row])
    _delete_checkpoints(file)


def _backbone_of_card(config: Config) -> BackboneConfig:
    """With `${VARIABLE}` in the path of its weights as the user wrote it; names are kept as they are."""
    if config.backbone.weights.startswith("hf-hub:"):
        return config.backbone
    return config.backbone.model_copy(update={"weights": config.as_written()["backbone"]["weights"]})


def _break_even(costs: Costs, trained: Trained) -> float | None:
    if costs.extract_seconds is None or costs.forward_seconds is None:
        return None
    samples_per_epoch = round(trained.samples_per_second * trained.seconds_per_epoch)
    return break_even_epochs(costs.extract_seconds, costs.forward_seconds, costs.forward_samples, samples_per_epoch)


def _gflops(name: str, trial: Trial, origin: Origin) -> float | None:
    backbone, facts = origin.shape, origin.facts
    if backbone is None or facts.tokens != "all":
        return None
    return inference_gflops(name, trial.options, facts.layers, len(facts.classes), backbone)


def _delete_checkpoints(file: Path) -> None:
    for leftover in file.parent.glob(f"{file.name}*"):
        leftover.unlink()


def adaptor_path(run_dir: Path, row: Row) -> Path:
    """Where the adaptor of a row lies."""
    return run_dir / "adaptors" / f"{row.method}-seed{row.seed}-{row.trial_id[:8]}.safetensors"


def _is_finished(run_dir: Path, trial_id: str) -> bool:
    """Whether row, adaptor and card are there; a trial of which one was deleted is trained again."""
    paths = [adaptor_path(run_dir, row) for row in _rows(run_dir) if row.trial_id == trial_id]
    return any(path.exists() and path.with_suffix(".json").exists() for path in paths)


def _rows(run_dir: Path) -> list[Row]:
    return read_results(run_dir) if (run_dir / "results.json").exists() else []


def _describe(trial: Trial) -> str:
    options = ", ".join(f"{name}={value}" for name, value in trial.options.model_dump(mode="json").items())
    rate = "" if trial.lr is None else f"lr={trial.lr:g}, "
    return f"{rate}weight_decay={trial.weight_decay:g}, {options}"


def _trial_id(
    method: MethodConfig, trial: Trial, config: Config, origin: Origin, material: Material, settings: Settings
) -> str:
    return digest(origin.identity, material.kind, method.name, trial, settings, config.data.val_fraction)


def _conditions(
    method: MethodConfig, config: Config, origin: Origin, material: Material, settings: Settings
) -> dict[str, Any]:
    return conditions_of(method.name, origin.identity, material.kind, settings, config.data.val_fraction)
