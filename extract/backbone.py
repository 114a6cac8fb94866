"""What a frozen backbone is, how one is opened by its name, and what of its tokens is kept."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.config import BackboneConfig, ClipConfig
from extract.frames import FrameBackbone
from extract.preprocess import Transform, transform_digest
from extract.tail import Tail
from extract.timm_vit import TimmBackbone, TokensByLayer
from extract.vivit import VivitBackbone
from extract.vivit_weights import VIVIT, empty_vivit, load_vivit
from extract.weights import build_empty, load_model, weights_digest
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

Images = Float[Tensor, "batch ..."]  # (batch, channels, height, width), or clips (batch, frames, channels, ...)
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


Tap = Callable[[nn.Module, Images], Mapping[int, Float[Tensor, "batch tokens dim"]]]


class TappedBackbone:
    """A user's own module. `tap(module, images)` returns its tokens by absolute layer index.

    Args:
        module: any frozen module, on the CPU.
        tap: maps (module, images (batch, ...)) to {layer: (batch, tokens, dim)}; prefix tokens first.
        transform: turns one sample of the dataset into a tensor; the identity by default.
        num_prefix_tokens: how many tokens stand before the patch grid.
        grid: the patch grid (height, width); by default one row of all patch tokens.
        example: one transformed sample, run once to learn the layers and shapes.
        name: how reports call it.
    """

    tail: Tail | None = None

    def __init__(
        self,
        module: nn.Module,
        tap: Tap,
        example: Float[Tensor, "..."],
        transform: Transform | None = None,
        num_prefix_tokens: int = 0,
        grid: tuple[int, ...] | None = None,
        name: str = "module",
    ) -> None:
        self.module, self._tap, self.name = module.eval().requires_grad_(False), tap, name
        self.model_kwargs: dict[str, Any] = {}
        self.transform = transform or torch.as_tensor
        self.image_size, self.preprocessing = tuple(example.shape), _stable_repr(transform)
        with torch.no_grad():
            tokens = tap(module, example[None])
        if not all(isinstance(layer, int) and layer >= 0 for layer in tokens):
            raise UserError(f"tap must return tokens by layer index, from 0 on, got the keys {list(tokens)}")
        shapes = {tuple(values.shape[1:]) for values in tokens.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise UserError(f"tap must return one (batch, tokens, dim) shape for every layer, got {sorted(shapes)}")
        num_tokens, self.dim = next(iter(shapes))
        self.depth = max(tokens) + 1
        self.layout = TokenLayout(num_prefix_tokens, grid or (1, num_tokens - num_prefix_tokens))
        if self.layout.num_tokens != num_tokens:
            raise UserError(f"tap returned {num_tokens} tokens, but {self.layout} has {self.layout.num_tokens}")

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """See `Backbone.tokens`."""
        tokens = self._tap(self.module, images)
        if missing := set(layers) - set(tokens):
            raise UserError(f"tap returned layers {sorted(tokens)}, not {sorted(missing)}")
        return {layer: tokens[layer] for layer in sorted(layers)}


def _stable_repr(transform: object) -> str:
    """A function's or object's text without its address, which is another one in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))


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
    backbone = TimmBackbone(*load_model(config), config.image_size)
    return FrameBackbone(backbone, clips.frames) if clips else backbone


def empty_backbone(name: str, model_kwargs: Mapping[str, Any], frames: int | None = None) -> ModelBackbone:
    """A backbone without weights, on the meta device: depth, width and token layout, even of ViViT-e, for free.

    Args:
        frames: how many a clip has; None for images, and for a ViViT as many as it takes.
    """
    if name == VIVIT:
        return VivitBackbone(empty_vivit(model_kwargs, frames), {})
    kwargs = dict(model_kwargs)
    backbone = TimmBackbone(name, kwargs, build_empty(name, kwargs), None)
    return FrameBackbone(backbone, frames) if frames else backbone


def digests(backbone: Backbone) -> dict[str, str]:
    """The digests by which a store knows a backbone and its preprocessing."""
    try:
        preprocessing = transform_digest(backbone.transform)
    except (TypeError, ValueError, RuntimeError):  # a user's transform of something that is no image
        preprocessing = backbone.preprocessing
    return {"weights_digest": weights_digest(backbone.module), "preprocessing_digest": preprocessing}


def reduce_tokens(
    tokens: Float[Tensor, "batch tokens dim"], layout: TokenLayout, how: Tokens
) -> Float[Tensor, "batch fewer dim"]:
    """What `store.tokens` keeps of a backbone's tokens; see `store.layout.reduced_layout`."""
    prefix, patches = tokens[:, : layout.num_prefix_tokens], tokens[:, layout.num_prefix_tokens :]
    if how == "all":
        return tokens
    if how == "cls":
        return prefix[:, layout.class_tokens]
    if how == "mean":
        return patches.mean(dim=1, keepdim=True)
    assert isinstance(how, Pool)
    batch, _, dim = tokens.shape
    if (sets := layout.prefix_sets) > 1:
        kept = (batch, sets // how.time, how.time, layout.num_prefix_tokens // sets, dim)
        prefix = prefix.reshape(kept).mean(dim=2).flatten(1, 2)
    parts = pool_sides(layout, how)
    shape = [n for side, part in zip(layout.grid, parts, strict=True) for n in (side // part, part)]
    axes = tuple(range(2, 2 + len(shape), 2))  # those within a part
    pooled = patches.reshape(batch, *shape, dim).mean(dim=axes)
    return torch.cat([prefix, pooled.flatten(1, -2)], dim=1)
