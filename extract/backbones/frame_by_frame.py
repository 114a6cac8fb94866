"""An image backbone on videos: applied to every frame by itself."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from extract.backbones.pre_logits import Tail, tail_of
from extract.backbones.timm_vit import TimmBackbone, TokensByLayer
from store.layout import TokenLayout


class FrameBackbone:
    """An image backbone on clips of `frames` frames. The transform and the augmentation are those of one frame."""

    def __init__(self, of_frame: TimmBackbone, frames: int) -> None:
        self._of_frame, self._frames = of_frame, frames
        self.name, self.model_kwargs, self.module = of_frame.name, of_frame.model_kwargs, of_frame.module
        self.depth, self.dim, self.block_layout = of_frame.depth, of_frame.dim, of_frame.layout
        self.layout = TokenLayout(
            frames * self.block_layout.num_prefix_tokens,
            (frames, *self.block_layout.grid),
            prefix_sets=frames,
            num_class_tokens=frames * self.block_layout.num_class_tokens,
        )
        self.image_size = (frames, *of_frame.image_size)
        self.transform, self.preprocessing, self.augment = of_frame.transform, of_frame.preprocessing, of_frame.augment
        self.tail: Tail | None = tail_of(self.module, prefix_sets=frames)

    def tokens(
        self, clips: Float[Tensor, "batch frames channels height width"], layers: Sequence[int]
    ) -> TokensByLayer:
        """See `extract.backbones.backbone.Backbone.tokens`."""
        by_layer = self._of_frame.tokens(clips.flatten(0, 1), layers)
        return {layer: self._join(values) for layer, values in by_layer.items()}

    def _join(self, tokens: Float[Tensor, "all_frames n dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The frames of a clip in one row: their prefix tokens, then their patches."""
        parts = tokens.tensor_split([self.block_layout.num_prefix_tokens], dim=1)
        rows = len(tokens) // self._frames
        return torch.cat([part.reshape(rows, self._frames * part.shape[1], self.dim) for part in parts], dim=1)

    def trainable_copy(self, depth: int) -> "FrameBackbone":
        """See `extract.backbones.timm_vit.TimmBackbone.trainable_copy`."""
        copied = copy.copy(self)
        copied._of_frame = self._of_frame.trainable_copy(depth)
        copied.module = copied._of_frame.module
        copied.tail = tail_of(copied.module, shared=True, prefix_sets=self._frames)
        return copied
