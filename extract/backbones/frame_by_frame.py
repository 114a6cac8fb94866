"""Applies an image backbone to videos, frame by frame."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from extract.backbones.pre_logits import PreLogits, pre_logits_of
from extract.backbones.timm_vit import TimmBackbone, TokensByLayer
from store.layout import TokenLayout


class FrameBackbone:
    """An image backbone on clips of `frames` frames; transform and augmentation apply to one frame."""

    def __init__(self, image_backbone: TimmBackbone, frames: int) -> None:
        self._image_backbone, self._frames = image_backbone, frames
        self.name, self.model_kwargs = image_backbone.name, image_backbone.model_kwargs
        self.module, self.depth, self.dim = image_backbone.module, image_backbone.depth, image_backbone.dim
        self.block_layout = image_backbone.layout
        self.layout = TokenLayout(
            frames * self.block_layout.num_prefix_tokens,
            (frames, *self.block_layout.grid),
            prefix_sets=frames,
            num_class_tokens=frames * self.block_layout.num_class_tokens,
        )
        self.image_size = (frames, *image_backbone.image_size)
        self.transform, self.preprocessing = image_backbone.transform, image_backbone.preprocessing
        self.augment = image_backbone.augment
        self.tail: PreLogits | None = pre_logits_of(self.module, prefix_sets=frames)

    def tokens(
        self, clips: Float[Tensor, "batch frames channels height width"], layers: Sequence[int]
    ) -> TokensByLayer:
        """See `extract.backbones.backbone.Backbone.tokens`."""
        by_layer = self._image_backbone.tokens(clips.flatten(0, 1), layers)
        return {layer: self._join(values) for layer, values in by_layer.items()}

    def _join(self, tokens: Float[Tensor, "all_frames n dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of a clip: the prefix tokens of all frames, then the patches of all frames."""
        parts = tokens.tensor_split([self.block_layout.num_prefix_tokens], dim=1)
        clips = len(tokens) // self._frames
        return torch.cat([part.reshape(clips, self._frames * part.shape[1], self.dim) for part in parts], dim=1)

    def trainable_copy(self, depth: int) -> "FrameBackbone":
        """See `extract.backbones.timm_vit.TimmBackbone.trainable_copy`."""
        copied = copy.copy(self)
        copied._image_backbone = self._image_backbone.trainable_copy(depth)
        copied.module = copied._image_backbone.module
        copied.tail = pre_logits_of(copied.module, shared=True, prefix_sets=self._frames)
        return copied
