"""Defines the interface of frozen backbones, loads them by name, and reduces their tokens to those that are stored."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from extract.backbones.frame_by_frame import FrameBackbone
from extract.backbones.model_spec import resolve_model
from extract.backbones.plain_vit_check import empty_vit
from extract.backbones.pre_logits import PreLogits
from extract.backbones.preprocessing import Transform, transform_digest
from extract.backbones.tapped_backbone import Images, TappedBackbone
from extract.backbones.timm_vit import TimmBackbone, TokensByLayer
from extract.backbones.vivit import VivitBackbone
from extract.backbones.vivit_weights import VIVIT, empty_vivit, load_vivit
from extract.backbones.weights import load_model, weights_digest
from extract.config import BackboneConfig, ClipConfig
from store.config import Tokens
from store.errors import UserError
from store.layout import TokenLayout, cells_a_side

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

ModelBackbone = TimmBackbone | FrameBackbone | VivitBackbone  # backbones that methods can train a copy of


@runtime_checkable
class Backbone(Protocol):
    """A frozen model that gives the tokens of its blocks.

    Attributes:
        name: of the model, as stores and reports show it.
        model_kwargs: with `name` they rebuild the architecture.
        depth: number of blocks.
        dim: width of the tokens.
        layout: of the token axis.
        image_size: shape of one transformed sample: (channels, height, width), with frames in front for clips.
        transform: maps a sample, or one frame of it, to pixels.
        preprocessing: describes the transform in words.
        tail: computes the pre-logits features from the last block's tokens; None if unknown.
    """

    name: str
    model_kwargs: dict[str, Any]
    module: nn.Module
    depth: int
    dim: int
    layout: TokenLayout
    image_size: tuple[int, ...]
    transform: Transform
    preprocessing: str
    tail: PreLogits | None

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """The outputs of some blocks, prefix tokens first; blocks after the last of these are not run."""
        ...


def load_backbone(config: BackboneConfig, clips: ClipConfig | None = None) -> ModelBackbone:
    """Load the configured backbone with its weights, on the CPU.

    Args:
        clips: how videos are sampled; None for images. A timm model is applied to each frame of a clip separately.

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
    # check the architecture without weights before any are fetched or read
    spec = resolve_model(config)
    empty = empty_vit(spec.name, spec.kwargs)
    model = load_model(spec, config.weights, empty.module)
    backbone = TimmBackbone(spec.name, spec.kwargs, model, config.image_size)
    return FrameBackbone(backbone, clips.frames) if clips else backbone


def empty_backbone(name: str, model_kwargs: Mapping[str, Any], frames: int | None = None) -> ModelBackbone:
    """A backbone without weights, on the meta device: depth, width and token layout at no cost.

    Args:
        frames: of a clip; None for images, and for a ViViT the number that it takes.

    Raises:
        UserError: a wrong name or argument; a model that is no plain vision transformer.
    """
    if name == VIVIT:
        return VivitBackbone(empty_vivit(model_kwargs, frames), {})
    backbone = empty_vit(name, dict(model_kwargs))
    return FrameBackbone(backbone, frames) if frames else backbone


def digests(backbone: Backbone) -> dict[str, str]:
    """Digests that identify a backbone's weights and its preprocessing."""
    weights = weights_digest(backbone.module)
    if isinstance(backbone, TappedBackbone):
        weights = f"{weights}, read by tap {backbone.tap_digest()}"
    return {"weights_digest": weights, "preprocessing_digest": _preprocessing_digest(backbone)}


def _preprocessing_digest(backbone: Backbone) -> str:
    try:
        return transform_digest(backbone.transform)
    except Exception:  # a user's transform that does not take images may raise anything
        if isinstance(backbone, TappedBackbone):
            return backbone.preprocessing_digest()
        return backbone.preprocessing


def reduce_tokens(
    tokens: Float[Tensor, "batch tokens dim"], layout: TokenLayout, how: Tokens
) -> Float[Tensor, "batch fewer dim"]:
    """Reduce a backbone's tokens as `store.tokens` says; `store.layout.reduced_layout` gives their layout."""
    if how == "all":
        return tokens
    prefix, patches = tokens[:, : layout.num_prefix_tokens], tokens[:, layout.num_prefix_tokens :]
    batch, _, dim = tokens.shape
    sets, per_set = layout.prefix_sets, layout.num_prefix_tokens // layout.prefix_sets
    if isinstance(how, str):
        classes = prefix.reshape(batch, sets, per_set, dim)[:, :, : layout.num_class_tokens // sets].flatten(1, 2)
        kept = {"cls": classes, "mean": patches.mean(dim=1, keepdim=True)}
        return torch.cat([kept[name] for name in how.split("_")], dim=1)
    # average prefix tokens over time, and patches over the cells of a coarser grid
    if sets > 1:
        prefix = prefix.reshape(batch, sets // how.time, how.time, per_set, dim).mean(dim=2).flatten(1, 2)
    pooled = _average_cells(patches.reshape(batch, *layout.grid, dim), cells_a_side(layout, how))
    return torch.cat([prefix, pooled.flatten(1, -2)], dim=1)


def _average_cells(
    patches: Float[Tensor, "batch *grid dim"], cells: Sequence[int]
) -> Float[Tensor, "batch *cells dim"]:
    """Average the patches of every cell of a coarser grid."""
    batch, *grid, dim = patches.shape
    if all(side % number == 0 for side, number in zip(grid, cells, strict=True)):
        shape = [n for side, number in zip(grid, cells, strict=True) for n in (number, side // number)]
        return patches.reshape(batch, *shape, dim).mean(dim=tuple(range(2, 2 + len(shape), 2)))
    for axis, number in enumerate(cells, start=1):  # cells overlap: the mean of a rectangle is that of its rows' means
        lines = patches.movedim(axis, -1)
        averaged = F.adaptive_avg_pool1d(lines.flatten(0, -2), number)
        patches = averaged.reshape(*lines.shape[:-1], number).movedim(-1, axis)
    return patches
