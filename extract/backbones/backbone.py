"""What a frozen backbone is, how one is opened by its name, and what of its tokens is kept."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.frame_by_frame import FrameBackbone
from extract.backbones.plain_vit_check import empty_vit
from extract.backbones.pre_logits import Tail
from extract.backbones.preprocessing import Transform, transform_digest
from extract.backbones.tapped_module import Images, TappedBackbone
from extract.backbones.timm_vit import TimmBackbone, TokensByLayer
from extract.backbones.vivit import VivitBackbone
from extract.backbones.vivit_weights import VIVIT, empty_vivit, load_vivit
from extract.backbones.weights import load_model, recipe_of, weights_digest
from extract.config import BackboneConfig, ClipConfig
from store.config import Pool, Tokens
from store.errors import UserError
from store.layout import TokenLayout, pool_sides

__all__ = [
    "Backbone",
    "Images",
    "ModelBackbone",
    "TappedBackbone",
    "TimmBackbone",
    "TokensByLayer",
    "digests",
    "empty_backbone",
    "load_backbone",
    "reduce_tokens",
]

ModelBackbone = TimmBackbone | FrameBackbone | VivitBackbone  # those of which methods may train a copy


@runtime_checkable
class Backbone(Protocol):
    """What the extraction needs to know of a frozen model."""

    name: str
    model_kwargs: dict[str, Any]
    module: nn.Module
    depth: int
    dim: int
    layout: TokenLayout
    image_size: tuple[int, ...]
    transform: Transform
    preprocessing: str
    tail: Tail | None

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """Block outputs of the chosen layers, prefix tokens first; blocks after the last of them are not run."""
        ...


def load_backbone(config: BackboneConfig, clips: ClipConfig | None = None) -> ModelBackbone:
    """Build the backbone that the configuration names, with its weights, on the CPU.

    Args:
        clips: how videos are sampled; None for images. A timm model is applied to every frame of a clip by itself.

    Raises:
        UserError: a wrong name or argument; weights of another model; a model that does not take such samples.
        JobError: the model hub cannot be reached.
    """
    if config.name == VIVIT:
        if clips is None:
            raise UserError(
                "backbone.name: vivit takes videos, but the samples are images; set data.source to video_folder or "
                "video_csv, or name one of timm's vision transformers"
            )
        return VivitBackbone(*load_vivit(config, clips.frames))
    recipe = recipe_of(config)
    empty_backbone(recipe.name, recipe.kwargs)  # what is no plain ViT is refused before weights are fetched or read
    backbone = TimmBackbone(*load_model(config), config.image_size)
    return FrameBackbone(backbone, clips.frames) if clips else backbone


def empty_backbone(name: str, model_kwargs: Mapping[str, Any], frames: int | None = None) -> ModelBackbone:
    """A backbone without weights, on the meta device: depth, width and token layout, even of ViViT-e, for free.

    Args:
        frames: how many a clip has; None for images, and for a ViViT as many as it takes.

    Raises:
        UserError: a wrong name or argument; a model that is no plain vision transformer.
    """
    if name == VIVIT:
        return VivitBackbone(empty_vivit(model_kwargs, frames), {})
    backbone = empty_vit(name, dict(model_kwargs))
    return FrameBackbone(backbone, frames) if frames else backbone


def digests(backbone: Backbone) -> dict[str, str]:
    """The digests by which a store knows a backbone and its preprocessing."""
    weights = weights_digest(backbone.module)
    if isinstance(backbone, TappedBackbone):
        weights = f"{weights}, read by tap {backbone.tap_digest()}"
    return {"weights_digest": weights, "preprocessing_digest": _preprocessing_digest(backbone)}


def _preprocessing_digest(backbone: Backbone) -> str:
    try:
        return transform_digest(backbone.transform)
    except Exception:  # a user's transform of something that is no image may raise anything
        if isinstance(backbone, TappedBackbone):
            return backbone.preprocessing_digest()
        return backbone.preprocessing


def reduce_tokens(
    tokens: Float[Tensor, "batch tokens dim"], layout: TokenLayout, how: Tokens
) -> Float[Tensor, "batch fewer dim"]:
    """What `store.tokens` keeps of a backbone's tokens; see `store.layout.reduced_layout`."""
    prefix, patches = tokens[:, : layout.num_prefix_tokens], tokens[:, layout.num_prefix_tokens :]
    if how == "all":
        return tokens
    batch, _, dim = tokens.shape
    sets, per_set = layout.prefix_sets, layout.num_prefix_tokens // layout.prefix_sets
    if how == "cls":
        return prefix.reshape(batch, sets, per_set, dim)[:, :, : layout.num_class_tokens // sets].flatten(1, 2)
    if how == "mean":
        return patches.mean(dim=1, keepdim=True)
    assert isinstance(how, Pool)
    if sets > 1:
        prefix = prefix.reshape(batch, sets // how.time, how.time, per_set, dim).mean(dim=2).flatten(1, 2)
    parts = pool_sides(layout, how)
    shape = [n for side, part in zip(layout.grid, parts, strict=True) for n in (side // part, part)]
    axes = tuple(range(2, 2 + len(shape), 2))  # those within a part
    pooled = patches.reshape(batch, *shape, dim).mean(dim=axes)
    return torch.cat([prefix, pooled.flatten(1, -2)], dim=1)
