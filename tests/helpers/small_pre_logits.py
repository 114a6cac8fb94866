"""Builds the `PreLogits` of very small vision transformers, and the layouts of their tokens."""

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from extract.backbones.pre_logits import PreLogits, pre_logits_of
from store.layout import TokenLayout


def layout_of(prefix: int, grid: tuple[int, ...], sets: int = 1) -> TokenLayout:
    """The first prefix token of every set is a class token; the others are registers."""
    return TokenLayout(prefix, grid, sets, num_class_tokens=sets if prefix else 0)


def make_pre_logits(dim: int, layout: TokenLayout, **kwargs: Any) -> PreLogits:
    """Of a timm ViT whose final norm is not the identity; it averages patches unless `kwargs` say otherwise."""
    prefix, classes = (n // layout.prefix_sets for n in (layout.num_prefix_tokens, layout.num_class_tokens))
    kwargs = {"global_pool": "avg", "fc_norm": False, "class_token": classes > 0} | kwargs
    kind = VisionTransformer
    if classes == 2:
        kind, kwargs["global_pool"] = VisionTransformerDistilled, "token"
    else:
        kwargs["reg_tokens"] = prefix - classes
    with torch.random.fork_rng(devices=[]):  # a test's later draws do not depend on the size of this model
        model = kind(img_size=2, patch_size=1, embed_dim=dim, depth=1, num_heads=2, num_classes=0, **kwargs)
        for norm in (model.norm, model.fc_norm):
            if isinstance(norm, nn.LayerNorm):
                nn.init.normal_(norm.weight, 1.0, 0.1)
    return pre_logits_of(model, prefix_sets=layout.prefix_sets)
