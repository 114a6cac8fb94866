"""The training job: for every method, choose on validation, train every seed, touch the test split once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from adapt.adaptor import Card, save_adaptor
from adapt.config import Config, MethodConfig, Trial
from adapt.cost import break_even_epochs, peak_memory
from adapt.features import (
    Features,
    OnlineFeatures,
    ResidentFeatures,
    StreamedFeatures,
    choose_source,
    spec_of_backbone,
    spec_of_store,
)
from adapt.methods import build_model, count_params
from adapt.results import Row, read_results, write_atomically, write_results
from adapt.search import choose_trial, train_trials
from adapt.spec import FeatureSpec
from adapt.train import Settings, evaluate_split
from extract.backbone import Backbone, digests, load_backbone
from extract.forward import FrozenForward, resolve_device, resolve_precision
from extract.run import Extraction, extract_tokens
from extract.sources import ImageSource, open_source
from store.errors import UserError
from store.layout import describe_tokens, resolve_layers
from store.reader import Store, open_store
from store.schema import refuse_difference

Say = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """Where a job's features come from, and the facts about it that rows and cards repeat."""

    features: Features
    identity: dict[str, Any]  # everything of the provenance that decides a feature
    dataset: str
    backbone_name: str
    card: dict[str, Any]
    extract_seconds: float | None = None
    store_bytes: int | None = None
    samples_extracted: int = 0


class Inputs:
    """The source and backbone of a configuration, opened when first needed; a user's own can be given instead."""

    def __init__(self, config: Config, source: ImageSource | None = None, backbone: Backbone | None = None) -> None:
        self._config, self.own_backbone = config, backbone is not None
        if source is not None:
            self.source = source
        if backbone is not None:
            self.backbone = backbone

    @cached_property
    def source(self) -> ImageSource:
        """The samples."""
        return open_source(self._config.data)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return load_backbone(self._config.backbone)


def extract(config: Config, inputs: Inputs) -> Extraction:
    """Bring the store of a configuration to completion."""
    return extract_tokens(inputs.source, inputs.backbone, config.data, config.store, config.extract)


def train(config: Config, inputs: Inputs, say: Say = lambda _: None) -> list[Row]:
    """Train every method of a configuration for every seed; trials that are done are not run again."""
    prepare_run_dir(config)
    origin = _open_origin(config, inputs, say)
    for method in config.parsed_methods():
        _train_method(method, config, origin, say)
    return read_results(config.run_dir)


def prepare_run_dir(config: Config) -> None:
    """Make the run directory and keep the resolved configuration in it."""
    make_run_dir(config.run_dir)
    write_atomically(config.run_dir / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def make_run_dir(run_dir: Path) -> None:
    """Make the run directory.

    Raises:
        UserError: the path is not one where a folder can be made.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error


def _open_origin(config: Config, inputs: Inputs, say: Say) -> Origin:
    if config.train.feature_source == "online":
        return _online_origin(config, inputs)
    store = open_store(config.store.path)
    chosen = _require_match(store, config, inputs)
    device = resolve_device(config.train.device)
    layers = _needed_layers(config, spec_of_store(store, chosen), len(store.classes))
    choice = choose_source(config.train.feature_source, store, layers, device)
    say(f"features: {choice.kind} ({choice.reason})")
    streamed = StreamedFeatures(store, device, chosen)
    features = ResidentFeatures(streamed, layers) if choice.kind == "resident" else streamed
    return _stored_origin(config, store, features)


def _require_match(store: Store, config: Config, inputs: Inputs) -> tuple[int, ...]:
    """Refuse a store that the configuration does not describe, as far as can be told without loading the backbone.

    Returns the layers that the configuration chooses among the stored ones.
    """
    provenance, layers = store.schema.provenance, resolve_layers(config.store.layers, store.schema.depth)
    pairs: dict[str, tuple[Any, Any]] = {
        "store.dtype": (provenance.dtype, config.store.dtype),
        "store.tokens": (provenance.tokens, describe_tokens(config.store.tokens)),
    }
    if not inputs.own_backbone:
        size, name = config.backbone.image_size, config.backbone.name
        pairs["backbone.name"] = (provenance.backbone, name or provenance.backbone)
        pairs["backbone.image_size"] = (provenance.image_size[-1], size or provenance.image_size[-1])
    different = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
    if not set(layers) <= set(store.layers):
        different["store.layers"] = (list(store.layers), list(layers))
    refuse_difference(different, store.url)
    return layers


def _stored_origin(config: Config, store: Store, features: Features) -> Origin:
    provenance = store.schema.provenance
    card = {
        "weights_digest": provenance.weights_digest,
        "preprocessing_digest": provenance.preprocessing_digest,
        "precision": provenance.precision,
        "layers": features.spec.layers,
        "tokens": config.store.tokens,
        "classes": store.classes,
        "multi_label": store.schema.multi_label,
    }
    samples = sum(store.num_samples(split) for split in store.splits)
    identity = {**provenance.model_dump(mode="json"), "layers": list(features.spec.layers)}
    name, seconds = provenance.backbone, store.log.get("extract_seconds")
    return Origin(features, identity, store.schema.dataset, name, card, seconds, store.n_bytes(), samples)


def _online_origin(config: Config, inputs: Inputs) -> Origin:
    source, backbone = inputs.source, inputs.backbone
    stored = resolve_layers(config.store.layers, backbone.depth)
    spec = spec_of_backbone(backbone, stored, config.store.tokens)
    layers = _needed_layers(config, spec, len(source.classes))
    extract_config = config.extract.model_copy(update={"device": config.train.device})
    forward = FrozenForward(backbone, layers, config.store.tokens, extract_config)
    features = OnlineFeatures(source, forward, config.store.tokens, stored)
    card = {
        **digests(backbone),
        "precision": resolve_precision(config.extract.precision, forward.device),
        "layers": stored,
        "tokens": config.store.tokens,
        "classes": source.classes,
        "multi_label": source.multi_label,
    }
    identity = json.loads(json.dumps({**card, "data": config.data.model_dump(mode="json")}, default=_plain))
    return Origin(features, identity, source.name, backbone.name, card)


def _needed_layers(config: Config, spec: FeatureSpec, num_classes: int) -> tuple[int, ...]:
    """Layers that any trial of any method reads."""
    models = [
        build_model(method.name, spec, num_classes, trial.options)
        for method in config.parsed_methods()
        for trial in method.trials
    ]
    return tuple(sorted({layer for model in models for layer in model.layers}))  # type: ignore[union-attr]


def settings_of(config: Config, method: MethodConfig, seed: int) -> Settings:
    """How a method is trained from a seed."""
    train = config.train
    balanced = train.class_weights == "balanced"
    return Settings(method.epochs, method.batch_size, seed, train.optimizer, train.warmup, balanced)


def _train_method(method: MethodConfig, config: Config, origin: Origin, say: Say) -> None:
    trial = _choose(method, config, origin)
    if len(method.trials) > 1:
        say(f"{method.name}: chose {_describe(trial)} among {len(method.trials)} on validation")
    for seed in config.train.seeds:
        settings = settings_of(config, method, seed)
        trial_id = _digest(
            origin.identity, origin.features.kind, method.name, trial, settings, config.data.val_fraction
        )
        if trial_id in _finished(config.run_dir):
            say(f"{method.name} seed {seed}: done before")
            continue
        _train_seed(trial_id, method, trial, config, origin, settings)


def _choose(method: MethodConfig, config: Config, origin: Origin) -> Trial:
    """Search with the first seed; the outcome is kept in the run directory."""
    settings, fraction = settings_of(config, method, config.train.seeds[0]), config.data.val_fraction
    search_id = _digest(origin.identity, method, settings, fraction)
    kept = config.run_dir / "search" / f"{method.name}-{search_id}.json"
    checkpoint = config.run_dir / "checkpoints" / f"search-{search_id}"
    trial = choose_trial(
        method, lambda trials: train_trials(method, trials, origin.features, settings, fraction, checkpoint), kept
    )
    _delete_checkpoints(checkpoint)
    return trial


def _train_seed(
    trial_id: str, method: MethodConfig, trial: Trial, config: Config, origin: Origin, settings: Settings
) -> None:
    features, file = origin.features, config.run_dir / "checkpoints" / trial_id
    with peak_memory(features.device) as peak:
        trained = train_trials(method, [trial], features, settings, config.data.val_fraction, file)
    best, speed = trained.candidates[0], trained.speed
    metrics = asdict(evaluate_split(best.model, trained.inputs, "test"))
    parameters, head = count_params(best.model)
    options = trial.options.model_dump(mode="json")
    n_train = round(speed.samples_per_second * speed.seconds_per_epoch)
    seconds = origin.extract_seconds
    row = Row(
        trial_id=trial_id,
        method=method.name,
        options=options,
        seed=settings.seed,
        dataset=origin.dataset,
        backbone=origin.backbone_name,
        feature_source=features.kind,
        lr=trial.lr,
        weight_decay=trial.weight_decay,
        epochs=method.epochs,
        best_epoch=best.best_epoch,
        val_score=best.score,
        **metrics,
        trainable_params=parameters,
        head_params=head,
        seconds_per_epoch=speed.seconds_per_epoch,
        samples_per_second=speed.samples_per_second,
        peak_memory_bytes=peak.n_bytes,
        extract_seconds=seconds,
        store_bytes=origin.store_bytes,
        break_even_epochs=break_even_epochs(seconds, origin.samples_extracted, n_train) if seconds else None,
    )
    card = Card(method=method.name, options=options, backbone=config.backbone, metrics=metrics, **origin.card)
    save_adaptor(adaptor_path(config.run_dir, row), best.model, card)
    write_results(config.run_dir, [row])
    _delete_checkpoints(file)


def _delete_checkpoints(file: Path) -> None:
    for leftover in file.parent.glob(f"{file.name}*"):
        leftover.unlink()


def adaptor_path(run_dir: Path, row: Row) -> Path:
    """Where the adaptor of a row lies."""
    return run_dir / "adaptors" / f"{row.method}-seed{row.seed}-{row.trial_id[:8]}.safetensors"


def _finished(run_dir: Path) -> set[str]:
    if not (run_dir / "results.json").exists():
        return set()
    return {row.trial_id for row in read_results(run_dir) if adaptor_path(run_dir, row).exists()}


def _describe(trial: Trial) -> str:
    options = ", ".join(f"{name}={value}" for name, value in trial.options.model_dump(mode="json").items())
    return f"lr={trial.lr:g}, weight_decay={trial.weight_decay:g}, {options}"


def _digest(*parts: Any) -> str:
    """A short id of everything that decides an outcome."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", serialize_as_any=True)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
