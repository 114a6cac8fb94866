"""Opens the features that a job trains from: stored in a token store, or computed online by the frozen backbone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch

from adapt.adaptors.card import Facts
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.choice import Choice, choose_source
from adapt.features.image_batches import ImageBatches, image_kind
from adapt.features.online import OnlineFeatures
from adapt.features.pooled import PooledFeatures
from adapt.features.specs import spec_of_backbone
from adapt.features.unstored import UnstoredSplits
from adapt.job.checks import Rows, require_match, require_same_backbone, require_whole, source_rows
from adapt.job.cost import ExtractionCosts
from adapt.job.inputs import Inputs
from adapt.job.unstored_splits import open_unstored
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import build_model, find_method
from adapt.training.distributed import world
from adapt.training.row_draw import RowDraw, warn_of_small_classes
from adapt.training.trials import TrainingData
from extract.backbones.backbone import ModelBackbone, digests, empty_backbone
from extract.backbones.vivit_weights import VIVIT
from extract.forward.device import resolve_device, resolve_precision
from extract.forward.frozen_forward import FrozenForward
from extract.job.store_schema import list_splits, sample_digests
from extract.sources.open_source import ImageSource
from extract.sources.videos import decoder_info
from store.config import SPLITS
from store.layout import resolve_layers
from store.reader import Store, open_store

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of a job, and the facts about them that results and adaptor cards record.

    Attributes:
        inputs: samples and backbone that the features are made from.
        store: None if the features are computed online.
        unstored: the splits that the store lacks; None if there are none.
        pooled: the features, and their pooled values.
        provenance: everything that determines the value of a feature; part of the id of every trial.
        dataset: its name in the results.
        backbone_name: its name in the results.
        shape: the backbone without its weights; None for a user's own module.
        augments: whether the images of end-to-end methods are augmented.
    """

    inputs: Inputs
    store: Store | None
    unstored: UnstoredSplits | None
    pooled: PooledFeatures
    provenance: dict[str, Any]
    dataset: str
    backbone_name: str
    shape: ModelBackbone | None
    facts: Facts
    costs: ExtractionCosts
    augments: bool

    def sample_ids(self, split: str) -> Sequence[str]:
        """The id of every sample of a split; its views have it with the number of the view."""
        ids = self._row_ids(split)
        views = self.pooled.features.views
        return ids if views == 1 else [sample.removesuffix("#0") for sample in ids[::views]]

    def _row_ids(self, split: str) -> Sequence[str]:
        if self.store is None:
            return self.inputs.source.splits[split].ids
        if self.unstored and split not in self.store.splits:
            return self.unstored.samples(split).ids
        return self.store.sample_ids(split)

    def kind(self, trains_backbone: bool) -> str:
        """What a method is trained from, as results name it."""
        return image_kind(self.augments) if trains_backbone else self.pooled.features.kind

    def training_data(self, trains_backbone: bool) -> TrainingData:
        """What a method is trained from.

        Raises:
            UserError: the backbone or the samples are not those that the features were made from.
        """
        return TrainingData(self.pooled, self._images if trains_backbone else None)

    @cached_property
    def _images(self) -> ImageBatches:
        """The images behind the features, verified once for all end-to-end methods."""
        source, features = self.inputs.source, self.pooled.features
        backbone = require_whole(self.inputs.backbone, features.spec)
        require_same_backbone(self.facts, backbone, self.store.url if self.store else "the features")
        backbone.module.to(features.device)
        return ImageBatches(
            source=source, backbone=backbone, device=features.device, rows=self._rows, augment=self.augments
        )

    @property
    def _rows(self) -> dict[str, Rows]:
        """Split -> the source's row of every row of the features."""
        source = self.inputs.source
        if self.store is None:
            return {split: np.arange(len(images)) for split, images in source.splits.items()}
        here = world()
        if not here.is_main_process:
            return _as_rows(here.broadcast(None))
        rows = source_rows(self.store, source)
        if self.unstored:
            rows |= {split: self.unstored.rows(split) for split in source.splits if split not in rows}
        return _as_rows(here.broadcast({split: numbers.tolist() for split, numbers in rows.items()}))


def _augments(config: Config) -> bool:
    return config.train.augment == "crop_flip"


def _as_rows(lists: Mapping[str, list[int]]) -> dict[str, Rows]:
    return {split: np.array(numbers, np.int64) for split, numbers in lists.items()}


def open_features(config: Config, inputs: Inputs, log: Log) -> FeatureSet:
    """Open the features that `train.feature_source` asks for.

    Args:
        config: the configuration.
        inputs: its samples and backbone.
        log: is called with the feature source that was chosen, and why.

    Raises:
        UserError: the store does not match the configuration.
        JobError: the store is damaged or incomplete.
    """
    opened = _open(config, inputs, log)
    features = opened.pooled.features
    warn_of_small_classes(
        features.labels("train"),
        RowDraw.of(config),
        opened.facts.classes,
        views=features.views,
        validation_rows=features.validation_rows(),
    )
    return opened


def _open(config: Config, inputs: Inputs, log: Log) -> FeatureSet:
    if config.train.feature_source == "online":
        if config.store.splits != list(SPLITS):
            log("train.feature_source is online: nothing is stored, and store.splits has no effect")
        return _online_features(config, inputs)
    # all processes open the same snapshot, even while the store grows
    here = world()
    store = Store.from_snapshot(
        here.broadcast(open_store(config.store.path).snapshot() if here.is_main_process else None)
    )
    layers = require_match(store, config, inputs.own_source, inputs.own_backbone is not None)
    unstored = open_unstored(config, inputs, store, log)
    streamed = StreamedFeatures(store, resolve_device(config.train.device), layers, unstored)
    # choose between memory and streaming, in one process for all
    needed = needed_layers(config, streamed.spec, len(store.classes))
    n_rows = store.num_samples("train") * (1 + store.schema.augmented_views)
    n_bytes = store.schema.bytes_of(n_rows, needed)
    choice = choose_source(config.train.feature_source, n_bytes, streamed.device)
    choice = Choice(*here.broadcast([choice.kind, choice.reason]))
    log(f"features: {choice.kind} ({choice.reason})")
    features = ResidentFeatures(streamed, needed) if choice.kind == "resident" else streamed
    return _stored_features(config, inputs, streamed, features)


def _stored_features(
    config: Config, inputs: Inputs, streamed: StreamedFeatures, features: StreamedFeatures | ResidentFeatures
) -> FeatureSet:
    store, unstored = streamed.store, streamed.unstored
    schema = unstored.schema if unstored else store.schema  # a trial is the same one either way
    provenance = schema.provenance
    return FeatureSet(
        inputs=inputs,
        store=store,
        unstored=unstored,
        pooled=PooledFeatures(features),
        provenance={**provenance.model_dump(mode="json"), "layers": list(features.spec.layers)},
        dataset=config.report_as.dataset or store.schema.dataset,
        backbone_name=config.report_as.backbone or provenance.backbone,
        shape=_shape(inputs, provenance.backbone, provenance.model_kwargs, provenance.image_size),
        facts=Facts(
            backbone=config.backbone,
            clips=config.data.clips,
            weights_digest=provenance.weights_digest,
            preprocessing_digest=provenance.preprocessing_digest,
            precision=provenance.precision,
            layers=features.spec.layers,
            tokens=config.store.tokens,
            classes=store.classes,
            multi_label=store.schema.multi_label,
        ),
        costs=ExtractionCosts.of_store(store),
        augments=_augments(config),
    )


def _online_features(config: Config, inputs: Inputs) -> FeatureSet:
    source, backbone = inputs.source, inputs.backbone
    # run the frozen backbone up to the last layer that any method reads
    stored = resolve_layers(config.store.layers, backbone.depth)
    spec = spec_of_backbone(backbone, stored, config.store.tokens)
    layers = needed_layers(config, spec, len(source.classes))
    extract_config = config.extract.model_copy(update={"device": config.train.device})
    forward = FrozenForward(backbone, layers, config.store.tokens, extract_config)
    # record what a store would record
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
    provenance = {**facts.model_dump(mode="json"), "samples": _sample_digests(source), "sampling": source.sampling}
    if source.augmentation:
        provenance["augmentation"] = source.augmentation
    if source.is_decoded_here:
        provenance["decoder_digest"] = decoder_info().digest
    return FeatureSet(
        inputs=inputs,
        store=None,
        unstored=None,
        pooled=PooledFeatures(OnlineFeatures(source, forward, config.store.tokens, stored)),
        provenance=provenance,
        dataset=config.report_as.dataset or source.name,
        backbone_name=config.report_as.backbone or backbone.name,
        shape=_shape(inputs, backbone.name, backbone.model_kwargs, backbone.image_size),
        facts=facts,
        costs=ExtractionCosts(),
        augments=_augments(config),
    )


def _shape(
    inputs: Inputs, name: str, model_kwargs: Mapping[str, Any], image_size: Sequence[int]
) -> ModelBackbone | None:
    """The backbone on the meta device; None for one that is neither timm's nor ViViT."""
    is_known = name == VIVIT or timm.is_model(name.split(".")[0])
    if inputs.own_backbone is not None or not is_known:
        return None
    return empty_backbone(name, model_kwargs, frames=image_size[0] if len(image_size) == 4 else None)


def _sample_digests(source: ImageSource) -> dict[str, str]:
    """A digest of each split's samples, as a store has it; rank 0 reads every file."""
    here = world()
    if not here.is_main_process:
        received: dict[str, str] = here.broadcast(None)
        return received
    computed = sample_digests(list_splits(source.splits))
    here.broadcast(computed)
    return computed


def needed_layers(config: Config, spec: FeatureSpec, num_classes: int) -> tuple[int, ...]:
    """Layers that any trial of any method reads, and the last one, which standardizes the read-out of all methods."""
    needed = set(spec.layers[-1:])
    for method in config.parsed_methods():
        if not find_method(method.name).trains_backbone:
            with torch.device("meta"):  # takes no memory and no random numbers
                models = [build_model(method.name, spec, num_classes, options) for options in method.different_options]
            needed |= {layer for model in models for layer in model.layers}  # type: ignore[union-attr]
    return tuple(sorted(needed))
