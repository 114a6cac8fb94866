"""Checks that the methods of a job fit its backbone, and that configuration, backbone and samples match its store."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from adapt.adaptors.card import Facts
from adapt.config.pipeline import Config
from adapt.features.specs import spec_of_backbone
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import build_model, find_method
from adapt.training.row_draw import RowDraw, draw_rows
from extract.backbones.backbone import Backbone, ModelBackbone, digests
from extract.backbones.backbone_shape import backbone_shape
from extract.backbones.vivit_weights import VIVIT
from extract.config import BackboneConfig
from extract.forward.device import resolve_device
from extract.job.store_schema import list_split
from extract.sources.augmented_views import describe_augmentation
from extract.sources.open_source import ImageSource
from extract.sources.splits import draw_settings
from extract.sources.store_order import OrderedSplit
from extract.sources.videos import sampling_text
from store.compare import Samples, refuse_changed_samples, refuse_difference
from store.errors import UserError
from store.layout import describe_tokens, resolve_layers
from store.reader import Store
from store.schema import AUGMENTED

Rows = Int[np.ndarray, "samples"]
_REMEDY = (
    "Methods that train end to end read the images again. Put the old ones back, or extract to another store: choose "
    "another store.path, or `sidecache run --on-changed new-store`"
)


def require_trainable(config: Config, own_backbone: Backbone | None = None) -> None:
    """Build every method of a job on the meta device, which takes neither time nor memory.

    Args:
        config: the configuration.
        own_backbone: module of the user, instead of `backbone:`.

    Raises:
        UserError: a method does not fit the backbone, or the layers and tokens that are to be stored; the training
            device is not available.
    """
    resolve_device(config.train.device)
    backbone = own_backbone or backbone_shape(config.backbone, config.data.clips)
    spec = spec_of_backbone(backbone, resolve_layers(config.store.layers, backbone.depth), config.store.tokens)
    for method in config.parsed_methods():
        whole = require_whole(backbone, spec) if find_method(method.name).trains_backbone else None
        for options in method.different_options:
            if not options.needs_measurement:  # else a measurement during the job chooses its targets
                with torch.device("meta"):
                    build_model(method.name, spec, 2, options, backbone=whole)


def require_rows(config: Config, source: ImageSource) -> None:
    """Draw the rows to train on and to validate on from the labels alone.

    Raises:
        UserError: there are too few samples for both.
    """
    for drawn in {RowDraw.of(config), RowDraw.of(config, for_search=True)}:
        draw_source_rows(source, drawn, seed=config.train.seeds[0])


def draw_source_rows(
    source: ImageSource, draw: RowDraw, seed: int
) -> tuple[Int[np.ndarray, "trained"], Int[np.ndarray, "validated"]]:
    """The rows of the training split of a source to train on and to validate on; see `draw_rows`."""
    train = source.splits["train"]
    own = None if train.validation is None else np.flatnonzero(train.validation)
    labels = torch.from_numpy(np.asarray(train.labels))
    return draw_rows(labels, draw, seed=seed, views=source.views, validation_rows=own)


def require_weights(config: BackboneConfig) -> None:
    """Refuse weights that are a path with nothing there.

    Raises:
        UserError: there is nothing.
    """
    weights = config.weights
    is_name = weights in ("pretrained", "random") or weights.startswith("hf-hub:")
    if not is_name and not Path(weights).exists():
        raise UserError(f"backbone.weights {weights!r} does not exist: the job cannot start without it")


def require_match(
    store: Store, config: Config, own_source: ImageSource | None = None, own_backbone: bool = False
) -> tuple[int, ...]:
    """Refuse a store that does not match the configuration, as far as that shows without loading the backbone.

    Args:
        store: the store.
        config: the configuration.
        own_source: samples of the user, instead of `data:`.
        own_backbone: whether a module of the user replaces `backbone:`.

    Returns:
        the layers that the configuration selects.

    Raises:
        UserError: a setting differs; the message names what is stored and what is wanted.
    """
    provenance, layers = store.schema.provenance, resolve_layers(config.store.layers, store.schema.depth)
    pairs: dict[str, tuple[Any, Any]] = {
        "store.dtype": (provenance.dtype, config.store.dtype),
        "store.tokens": (provenance.tokens, describe_tokens(config.store.tokens)),
        "data.video, how frames are drawn": (provenance.sampling, _sampling(config, own_source)),
        "data.val_split": (store.schema.val_split or None, _val_split(config, own_source)),
    }
    if not own_backbone:
        pairs |= _backbone_pairs(store, config)
    if config.extract.precision != "auto":
        pairs["extract.precision"] = (provenance.precision, config.extract.precision)
    if provenance.drawn:
        pairs["data, how the test split is drawn"] = (provenance.drawn, draw_settings(config.data))
    if config.data.views > 1 or provenance.augmentation:
        pairs["data.views, how random crops are drawn"] = (
            provenance.augmentation or None,
            describe_augmentation(config.data) or None,
        )
    if not set(layers) <= set(store.layers):
        pairs["store.layers"] = (list(store.layers), list(layers))
    refuse_difference(pairs, store.url)
    return layers


def _backbone_pairs(store: Store, config: Config) -> dict[str, tuple[Any, Any]]:
    """Setting -> (stored value, value of the configuration); a setting that is not given matches."""
    provenance, size, name = store.schema.provenance, config.backbone.image_size, config.backbone.name
    pairs: dict[str, tuple[Any, Any]] = {
        "backbone.name": (provenance.backbone, name or provenance.backbone),
        "backbone.image_size": (provenance.image_size[-1], size or provenance.image_size[-1]),
    }
    given, stored = config.backbone.model_dump(mode="json")["model_kwargs"], provenance.model_kwargs
    if provenance.backbone == VIVIT:  # only arguments that differ from ViViT-B are stored
        stored = given | stored
    return pairs | {f"backbone.model_kwargs.{key}": (stored.get(key), value) for key, value in given.items()}


def _sampling(config: Config, own_source: ImageSource | None) -> str:
    if own_source is not None:
        return own_source.sampling
    return sampling_text(config.data.clips) if config.data.clips else ""


def _val_split(config: Config, own_source: ImageSource | None) -> str | None:
    return config.data.val_split if own_source is None else own_source.val_split or None


def require_whole(backbone: Backbone, spec: FeatureSpec) -> ModelBackbone:
    """Refuse what end-to-end methods cannot train: a module that is no known model, and features of some tokens only.

    Raises:
        UserError: it is one of these.
    """
    if not isinstance(backbone, ModelBackbone):
        raise UserError(
            "end-to-end methods need a timm or ViViT backbone: a module of your own has no blocks to change"
        )
    if spec.layout != backbone.layout:
        raise UserError("end-to-end methods need store.tokens: all; their read-out is standardized by those tokens")
    return backbone


def require_same_backbone(facts: Facts, backbone: Backbone, where: str) -> None:
    """Refuse a backbone whose digests are not those of the features.

    Raises:
        UserError: its weights or its preprocessing differ.
    """
    found = digests(backbone)
    pairs = {name: (getattr(facts, name), found[name]) for name in found}
    refuse_difference(pairs, where)


def source_rows(store: Store, source: ImageSource) -> dict[str, Rows]:
    """Split -> the source's row of every row of a store but augmented views; every sample's file is read and compared.

    Raises:
        UserError: classes, samples or labels differ from the stored ones.
    """
    fields = ("multi_label", "val_split")
    refuse_difference({name: (getattr(store.schema, name), getattr(source, name)) for name in fields}, store.url)
    rows, listings = dict[str, Rows](), {}
    splits = [split for split in store.splits if split != AUGMENTED]  # end-to-end training draws views of its own
    for split in splits:
        images = source.splits[split]
        row_of = {sample: row for row, sample in enumerate(images.ids)}
        found = [row_of[sample] for sample in store.sample_ids(split) if sample in row_of]
        rows[split] = np.array(found, np.int64)
        listings[split] = list_split(split, OrderedSplit(images, rows[split]))
    stored = Samples(store.classes, {split: store.listing(split) for split in splits})
    refuse_changed_samples(stored, Samples(source.classes, listings), store.url, _REMEDY)
    return rows
