"""Gives the tokens of ViViT with joint space-time attention by layer (Arnab et al., ICCV 2021, arXiv 2103.15691)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.augmentation import Augment
from extract.backbones.pre_logits import PreLogits, vivit_pre_logits
from extract.backbones.preprocessing import describe
from extract.backbones.timm_vit import TokensByLayer
from extract.backbones.vivit_preprocessing import build_vivit_transform, vivit_data_config
from extract.backbones.vivit_weights import VIVIT, architecture, frame_size, token_grid
from store.layout import TokenLayout


class VivitBackbone:
    """transformers' ViViT: one class token, then one token for every tubelet of a clip.

    Args:
        model: a `transformers.VivitModel` without pooler.
        preprocessor_config: of the weights; see `vivit_preprocessing.vivit_data_config`.
    """

    def __init__(self, model: nn.Module, preprocessor_config: Mapping[str, Any]) -> None:
        config: Any = model.config
        self.name, self.model_kwargs, self.module = VIVIT, architecture(config), model
        self.depth, self.dim = int(config.num_hidden_layers), int(config.hidden_size)
        self.layout = self.block_layout = TokenLayout(1, token_grid(config), num_class_tokens=1)
        data = vivit_data_config(preprocessor_config, frame_size(config))
        self.image_size = (int(config.num_frames), *data["input_size"])
        self.transform, self.preprocessing = build_vivit_transform(data), describe(data)
        self.augment = Augment(data)
        self.tail: PreLogits | None = vivit_pre_logits(model)

    def tokens(
        self, clips: Float[Tensor, "batch frames channels height width"], layers: Sequence[int]
    ) -> TokensByLayer:
        """See `extract.backbones.backbone.Backbone.tokens`."""
        hidden, tokens = self.module.embeddings(clips), {}  # type: ignore[operator]
        for index, block in enumerate(self.module.layers[: max(layers) + 1]):  # type: ignore[index]
            hidden = block(hidden)
            if index in layers:
                tokens[index] = hidden
        return tokens

    def trainable_copy(self, depth: int) -> "VivitBackbone":
        """See `extract.backbones.timm_vit.TimmBackbone.trainable_copy`."""
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module).requires_grad_(False)
        copied.module.layers = copied.module.layers[:depth]  # type: ignore[index]
        copied.tail = vivit_pre_logits(copied.module, shared=True)
        return copied
