"""Whether configuration, backbone and samples are still those that a store was made from."""

from typing import Any

import numpy as np
from jaxtyping import Int

from adapt.adaptor import Facts
from adapt.config.pipeline import Config
from adapt.methods.feature_spec import FeatureSpec
from extract.backbones.backbone import Backbone, ModelBackbone, digests
from extract.backbones.vivit_weights import VIVIT
from extract.job.store_schema import list_split
from extract.sources.open_source import ImageSource
from extract.sources.splits import draw_settings
from extract.sources.store_order import OrderedSplit
from extract.sources.videos import sampling_text
from store.compare import Samples, refuse_changed_samples, refuse_difference
from store.errors import UserError
from store.layout import describe_tokens, resolve_layers
from store.reader import Store

Rows = Int[np.ndarray, "samples"]
_REMEDY = (
    "Methods that train end to end read the images again. Put the old ones back, or extract to another store: choose "
    "another store.path, or `sidecache run --on-changed new-store`"
)


def require_match(
    store: Store, config: Config, source: ImageSource | None = None, own_backbone: bool = False
) -> tuple[int, ...]:
    """Refuse a store that the configuration does not describe, as far as can be told without loading the backbone.

    Args:
        source: the user's own, in place of `data:`.
        own_backbone: whether a module of the user's stands in place of `backbone:`.

    Returns:
        the layers that the configuration chooses among the stored ones.
    """
    provenance, layers = store.schema.provenance, resolve_layers(config.store.layers, store.schema.depth)
    pairs: dict[str, tuple[Any, Any]] = {
        "store.dtype": (provenance.dtype, config.store.dtype),
        "store.tokens": (provenance.tokens, describe_tokens(config.store.tokens)),
        "data.video, how frames are drawn": (provenance.sampling, _sampling(config, source)),
    }
    if not own_backbone:
        size, name = config.backbone.image_size, config.backbone.name
        pairs["backbone.name"] = (provenance.backbone, name or provenance.backbone)
        pairs["backbone.image_size"] = (provenance.image_size[-1], size or provenance.image_size[-1])
        given, held = config.backbone.model_dump(mode="json")["model_kwargs"], provenance.model_kwargs  # both as JSON
        if provenance.backbone == VIVIT:  # of which only what differs from ViViT-B is kept
            held = given | held
        for key, value in given.items():
            pairs[f"backbone.model_kwargs.{key}"] = (held.get(key), value)
    if config.extract.precision != "auto":
        pairs["extract.precision"] = (provenance.precision, config.extract.precision)
    if provenance.drawn:
        pairs["data, how the test split is drawn"] = (provenance.drawn, draw_settings(config.data))
    if not set(layers) <= set(store.layers):
        pairs["store.layers"] = (list(store.layers), list(layers))
    refuse_difference(pairs, store.url)
    return layers


def _sampling(config: Config, source: ImageSource | None) -> str:
    if source is not None:
        return source.sampling
    return sampling_text(config.data.clips) if config.data.clips else ""


def require_whole(backbone: Backbone, spec: FeatureSpec) -> ModelBackbone:
    """Refuse what no end-to-end method can train: another module than a known model, and features of some tokens."""
    if not isinstance(backbone, ModelBackbone):
        raise UserError(
            "end-to-end methods need a timm or ViViT backbone: a module of your own has no blocks to change"
        )
    if spec.layout != backbone.layout:
        raise UserError("end-to-end methods need store.tokens: all; their read-out is standardized by those tokens")
    return backbone


def require_same_backbone(facts: Facts, backbone: Backbone, where: str) -> None:
    """Refuse a backbone that is not the one that the features were made with."""
    found = digests(backbone)
    pairs = {name: (getattr(facts, name), found[name]) for name in found}
    refuse_difference(pairs, where)


def source_rows(store: Store, source: ImageSource) -> dict[str, Rows]:
    """Split -> the source's row of every row of a store. The files of all of them are read, and compared.

    Raises:
        UserError: classes, samples, or labels of samples are not those that the store holds.
    """
    refuse_difference({"multi_label": (store.schema.multi_label, source.multi_label)}, store.url)
    rows, listings = dict[str, Rows](), {}
    for split in store.splits:
        images = source.splits[split]
        row_of = {sample: row for row, sample in enumerate(images.ids)}
        held = [row_of[sample] for sample in store.sample_ids(split) if sample in row_of]
        rows[split] = np.array(held, np.int64)
        listings[split] = list_split(split, OrderedSplit(images, rows[split]))
    stored = Samples(store.classes, {split: store.listing(split) for split in store.splits})
    refuse_changed_samples(stored, Samples(source.classes, listings), store.url, _REMEDY)
    return rows
