"""Where a training job's features come from: a store, or the frozen backbone itself."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch

from adapt.adaptor import Facts
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.choice import Choice, choose_source
from adapt.features.image_batches import ImageBatches
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.features.specs import spec_of_backbone
from adapt.job.checks import Rows, require_match, require_same_backbone, require_whole, source_rows
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import build_model, find_method
from adapt.training.distributed import world
from extract.backbones.backbone import Backbone, ModelBackbone, digests, empty_backbone, load_backbone
from extract.backbones.vivit_weights import VIVIT
from extract.forward.device import resolve_device, resolve_precision
from extract.forward.frozen_forward import FrozenForward
from extract.job.store_schema import list_split, sample_digests
from extract.sources.open_source import ImageSource, open_source
from extract.sources.videos import decoder_info
from store.address import store_url
from store.growing.growth import read_known
from store.kvstore import KeyValueStore
from store.layout import resolve_layers
from store.reader import Store, open_store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Costs:
    """What the store of a job cost; None where there is none, or where its log does not tell."""

    extract_seconds: float | None = None
    forward_seconds: float | None = None
    forward_samples: int = 0  # those of `forward_seconds`: one that also went forward for added layers counts again
    store_bytes: int | None = None


@dataclass(frozen=True)
class Origin:
    """The features of a job, and the facts about them that rows and cards repeat."""

    inputs: "Inputs"
    store: Store | None  # None: the features are computed online
    pooled: PooledFeatures
    identity: dict[str, Any]  # everything that decides a feature
    dataset: str
    backbone_name: str
    shape: ModelBackbone | None  # the backbone without its weights; None for a user's own module
    facts: Facts
    costs: Costs

    def images(self, augment: bool) -> ImageBatches:
        """The images behind the features, for methods that train end to end.

        Raises:
            UserError: the backbone or the samples are not those that the features were made from.
        """
        source, features = self.inputs.source, self.pooled.features
        backbone = require_whole(self.inputs.backbone, features.spec)
        require_same_backbone(self.facts, backbone, self.store.url if self.store else "the features")
        backbone.module.to(features.device)
        return ImageBatches(source=source, backbone=backbone, device=features.device, rows=self._rows, augment=augment)

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """Split -> the source's row of every row of the features, found and checked once for all methods."""
        source = self.inputs.source
        if self.store is None:
            return {split: np.arange(len(images)) for split, images in source.splits.items()}
        here = world()
        rows = (
            {split: rows.tolist() for split, rows in source_rows(self.store, source).items()}
            if here.is_main_process
            else None
        )
        return {split: np.array(told, np.int64) for split, told in here.broadcast(rows).items()}


def _shape(name: str, model_kwargs: Mapping[str, Any], image_size: Sequence[int], own: bool) -> ModelBackbone | None:
    if own or not (name == VIVIT or timm.is_model(name.split(".")[0])):
        return None
    return empty_backbone(name, model_kwargs, frames=image_size[0] if len(image_size) == 4 else None)


class Inputs:
    """The source and backbone of a configuration, opened when first needed; a user's own can be given instead."""

    def __init__(self, config: Config, source: ImageSource | None = None, backbone: Backbone | None = None) -> None:
        self._config, self.own_source, self.own_backbone = config, source, backbone is not None
        if backbone is not None:
            self.backbone = backbone

    @cached_property
    def source(self) -> ImageSource:
        """The samples; of a test split that is drawn, those that the store holds on the side where it holds them."""
        if self.own_source is not None:
            return self.own_source
        return open_source(self._config.data, read_known(KeyValueStore(store_url(self._config.store.path))))

    def at(self, config: Config) -> "Inputs":
        """The same for another store."""
        inputs = copy(self)
        inputs._config = config
        inputs.__dict__.pop("source", None)
        return inputs

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return load_backbone(self._config.backbone, self._config.data.clips)


def open_origin(config: Config, inputs: Inputs, say: Say) -> Origin:
    """Open what `train.feature_source` asks for.

    Raises:
        UserError: the configuration does not describe the store.
        JobError: the store is damaged or unfinished.
    """
    if config.train.feature_source == "online":
        return _online_origin(config, inputs)
    here = world()  # whose processes would open stores of different sizes, were it growing
    store = Store.from_snapshot(
        here.broadcast(open_store(config.store.path).snapshot() if here.is_main_process else None)
    )
    layers = require_match(store, config, inputs.own_source, inputs.own_backbone)
    streamed = StreamedFeatures(store, resolve_device(config.train.device), layers)
    needed = needed_layers(config, streamed.spec, len(store.classes))
    n_bytes = store.schema.bytes_of(store.num_samples("train"), needed)
    choice = choose_source(config.train.feature_source, n_bytes, streamed.device)
    choice = Choice(*here.broadcast([choice.kind, choice.reason]))  # one for all
    say(f"features: {choice.kind} ({choice.reason})")
    features = ResidentFeatures(streamed, needed) if choice.kind == "resident" else streamed
    return _stored_origin(config, inputs, store, features)


def _stored_origin(
    config: Config, inputs: Inputs, store: Store, features: StreamedFeatures | ResidentFeatures
) -> Origin:
    provenance = store.schema.provenance
    facts = Facts(
        backbone=config.backbone,
        clips=config.data.clips,
        weights_digest=provenance.weights_digest,
        preprocessing_digest=provenance.preprocessing_digest,
        precision=provenance.precision,
        layers=features.spec.layers,
        tokens=config.store.tokens,
        classes=store.classes,
        multi_label=store.schema.multi_label,
    )
    samples, log = sum(store.num_samples(split) for split in store.splits), store.log
    forward = max(samples, round(log.get("forward_samples", 0)))  # older logs do not count them
    costs = Costs(log.get("extract_seconds"), log.get("forward_seconds"), forward, store.n_bytes())
    identity = {**provenance.model_dump(mode="json"), "layers": list(features.spec.layers)}
    shape = _shape(provenance.backbone, provenance.model_kwargs, provenance.image_size, inputs.own_backbone)
    pooled, dataset = PooledFeatures(features), store.schema.dataset
    return Origin(inputs, store, pooled, identity, dataset, provenance.backbone, shape, facts, costs)


def _online_origin(config: Config, inputs: Inputs) -> Origin:
    source, backbone = inputs.source, inputs.backbone
    stored = resolve_layers(config.store.layers, backbone.depth)
    spec = spec_of_backbone(backbone, stored, config.store.tokens)
    layers = needed_layers(config, spec, len(source.classes))
    extract_config = config.extract.model_copy(update={"device": config.train.device})
    forward = FrozenForward(backbone, layers, config.store.tokens, extract_config)
    features = OnlineFeatures(source, forward, config.store.tokens, stored)
    facts = Facts(
        backbone=config.backbone,
        clips=config.data.clips,
        precision=resolve_precision(config.extract.precision, forward.device),
        layers=stored,
        tokens=config.store.tokens,
        classes=source.classes,
        multi_label=source.multi_label,
        **digests(backbone),
    )
    identity = {**facts.model_dump(mode="json"), "samples": _samples(source), "sampling": source.sampling}
    if source.is_decoded_here:
        identity["decoder_digest"] = decoder_info().digest
    shape = _shape(backbone.name, backbone.model_kwargs, backbone.image_size, inputs.own_backbone)
    return Origin(inputs, None, PooledFeatures(features), identity, source.name, backbone.name, shape, facts, Costs())


def _samples(source: ImageSource) -> dict[str, str]:
    """By what the results of a source are known again, as a store knows its samples; every file is read."""
    here, splits = world(), source.splits
    digests: dict[str, str] = here.broadcast(
        sample_digests({name: list_split(name, split) for name, split in splits.items()})
        if here.is_main_process
        else None
    )
    return digests


def needed_layers(config: Config, spec: FeatureSpec, num_classes: int) -> tuple[int, ...]:
    """Layers that any trial of any method reads; end-to-end methods standardize their read-out by the last one."""
    needed = set(spec.layers[-1:])
    for method in config.parsed_methods():
        if not find_method(method.name).trains_backbone:
            with torch.device("meta"):  # neither memory nor a draw from the caller's generator
                models = [build_model(method.name, spec, num_classes, options) for options in method.different_options]
            needed |= {layer for model in models for layer in model.layers}  # type: ignore[union-attr]
    return tuple(sorted(needed))
