"""Gives the tokens of timm's vision transformers by layer."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.augmentation import Augment
from extract.backbones.pre_logits import PreLogits, pre_logits_of
from extract.backbones.preprocessing import build_transform, data_config, describe
from store.errors import Note, UserError
from store.layout import TokenLayout

TokensByLayer = dict[int, Float[Tensor, "batch tokens dim"]]


class TimmBackbone:
    """A plain vision transformer of timm: blocks of equal shape over prefix tokens and a patch grid.

    `extract.backbones.plain_vit_check.empty_vit` checks beforehand, without weights, that a model is one.

    Args:
        name: of the architecture.
        model_kwargs: that `model` was built with.
        model: a timm model.
        image_size: side of the images in pixels; None for the model's own.

    Raises:
        UserError: the model has no blocks on a patch grid, or prefix tokens of an unknown kind.
    """

    def __init__(self, name: str, model_kwargs: dict[str, Any], model: nn.Module, image_size: int | None) -> None:
        blocks, patch_embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
        grid = getattr(patch_embed, "grid_size", None)
        if not hasattr(model, "forward_intermediates") or blocks is None or grid is None:
            raise not_plain(name, model_kwargs, "it has no token blocks on a patch grid")
        self.name, self.model_kwargs, self.module = name, model_kwargs, model
        self.depth, self.dim = len(blocks), int(model.embed_dim)  # type: ignore[arg-type]
        self.layout = self.block_layout = _layout(name, model_kwargs, model, grid)
        config = data_config(model, image_size)
        self.image_size = tuple(config["input_size"])
        _note_unseen_pixels(image_size, getattr(patch_embed, "patch_size", ()))
        self.transform, self.preprocessing = build_transform(config), describe(config)
        self.augment = Augment(config)
        self.tail: PreLogits | None = pre_logits_of(model)

    def tokens(self, images: Float[Tensor, "batch channels height width"], layers: Sequence[int]) -> TokensByLayer:
        """See `extract.backbones.backbone.Backbone.tokens`."""
        outputs = self.module.forward_intermediates(  # type: ignore[operator]
            images,
            indices=list(layers),
            return_prefix_tokens=self.layout.num_prefix_tokens > 0,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # timm returns ascending layers, and the prefix tokens separately; stored tokens have them first
        joined = [torch.cat([out[1], out[0]], dim=1) if isinstance(out, tuple) else out for out in outputs]
        return dict(zip(sorted(layers), joined, strict=True))

    def trainable_copy(self, depth: int) -> "TimmBackbone":
        """A frozen copy of the first `depth` blocks; the tail shares the final norm with the copied module."""
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module).requires_grad_(False)
        copied.module.blocks = copied.module.blocks[:depth]  # type: ignore[index]
        copied.tail = pre_logits_of(copied.module, shared=True)
        return copied


def not_plain(name: str, model_kwargs: dict[str, Any], reason: str) -> UserError:
    """The error for a model that is no plain vision transformer."""
    given = f" with model_kwargs {model_kwargs}" if model_kwargs else ""
    return UserError(
        f"backbone.name {name!r}{given} is no plain vision transformer ({reason}); "
        "legal: timm's vit_*, deit_*, eva*, beit* and similar models"
    )


def _layout(name: str, model_kwargs: dict[str, Any], model: nn.Module, grid: Sequence[int]) -> TokenLayout:
    """The layout of timm's tokens: class token, distillation token or registers, patches."""
    counts = {}
    for kind in ("cls_token", "dist_token", "reg_token"):
        parameter = getattr(model, kind, None)
        counts[kind] = 0 if parameter is None else parameter.shape[1]
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if prefix != sum(counts.values()):
        raise not_plain(name, model_kwargs, f"of its {prefix} prefix tokens, these are known: {counts}")
    classes = counts["cls_token"] + counts["dist_token"]
    return TokenLayout(prefix, tuple(int(side) for side in grid), num_class_tokens=classes)


def _note_unseen_pixels(image_size: int | None, patch: Sequence[int]) -> None:
    for side in {side for side in patch if image_size and image_size % side}:
        assert image_size
        warnings.warn(
            f"backbone.image_size {image_size} is no multiple of the patch's {side} pixels: the last "
            f"{image_size % side} of every row and column are not used",
            Note,
            stacklevel=2,
        )
