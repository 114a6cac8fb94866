"""Reads the `FeatureSpec` of a store or of a backbone."""

from collections.abc import Sequence

from adapt.methods.feature_spec import FeatureSpec
from extract.backbones.backbone import Backbone
from extract.backbones.pre_logits import plain_norm_pre_logits, pre_logits_from_arrays
from extract.backbones.preprocessing import is_described
from store.config import Tokens
from store.layout import reduced_layout
from store.reader import Store


def spec_of_store(store: Store, layers: Sequence[int] | None = None) -> FeatureSpec:
    """The spec of a store's tokens, with the final norm and pooling whose tensors it keeps.

    Args:
        store: an open store.
        layers: some of its layers; all by default.
    """
    schema, provenance = store.schema, store.schema.provenance
    pre_logits = plain_norm_pre_logits(schema.dim)
    if schema.tail_tensors or is_described(provenance.preprocessing):  # some named models have no such tensor
        pre_logits = pre_logits_from_arrays(
            provenance.backbone, provenance.model_kwargs, store.tail_arrays(), schema.prefix_sets
        )
    return FeatureSpec(
        layers=schema.check_layers(tuple(layers or schema.layers)),
        depth=schema.depth,
        dim=schema.dim,
        layout=schema.token_layout,
        pre_logits=pre_logits,
    )


def spec_of_backbone(backbone: Backbone, layers: Sequence[int], tokens: Tokens = "all") -> FeatureSpec:
    """The spec of a backbone's tokens; the final norm of a user's own module is a plain LayerNorm.

    Args:
        backbone: also one on the meta device.
        layers: which blocks are read.
        tokens: which tokens are kept, as in `store.tokens`.
    """
    layout = reduced_layout(backbone.layout, tokens)
    pre_logits = backbone.tail.for_sets(layout.prefix_sets) if backbone.tail else plain_norm_pre_logits(backbone.dim)
    return FeatureSpec(
        layers=tuple(layers), depth=backbone.depth, dim=backbone.dim, layout=layout, pre_logits=pre_logits
    )
