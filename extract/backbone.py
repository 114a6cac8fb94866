"""A frozen vision transformer as "tokens by layer"."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.augment import Augment
from extract.config import BackboneConfig
from extract.preprocess import Transform, build_transform, data_config, describe, transform_digest
from extract.tail import Tail, tail_of
from extract.weights import build_empty, load_model, weights_digest
from store.config import Pool, Tokens
from store.errors import UserError
from store.layout import TokenLayout

Images = Float[Tensor, "batch channels height width"]
TokensByLayer = dict[int, Float[Tensor, "batch tokens dim"]]


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


class TimmBackbone:
    """Any timm vision transformer with `forward_intermediates`."""

    def __init__(self, name: str, model_kwargs: dict[str, Any], model: nn.Module, image_size: int | None) -> None:
        blocks, patch_embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
        grid = getattr(patch_embed, "grid_size", None)
        if not hasattr(model, "forward_intermediates") or blocks is None or grid is None:
            raise UserError(
                f"backbone.name {name!r} is no plain vision transformer (it has no token blocks on a patch grid); "
                "legal: timm's vit_*, deit_*, eva*, beit* and their kin"
            )
        self.name, self.model_kwargs, self.module = name, model_kwargs, model
        self.depth, self.dim = len(blocks), int(model.embed_dim)  # type: ignore[arg-type]
        self.layout = TokenLayout(int(getattr(model, "num_prefix_tokens", 0)), tuple(int(side) for side in grid))
        config = data_config(model, image_size)
        self.image_size = tuple(config["input_size"])
        self.transform, self.preprocessing = build_transform(config), describe(config)
        self.augment = Augment(config)
        self.tail: Tail | None = tail_of(model)

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """See `Backbone.tokens`."""
        outputs = self.module.forward_intermediates(  # type: ignore[operator]
            images,
            indices=list(layers),
            return_prefix_tokens=self.layout.num_prefix_tokens > 0,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # timm returns ascending layers, and splits prefix tokens off; stored tokens have them in front.
        joined = [torch.cat([out[1], out[0]], dim=1) if isinstance(out, tuple) else out for out in outputs]
        return dict(zip(sorted(layers), joined, strict=True))

    def trainable_copy(self, depth: int) -> "TimmBackbone":
        """The first `depth` blocks in a module of their own, still frozen; the tail's norm is that module's."""
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module).requires_grad_(False)
        copied.module.blocks = copied.module.blocks[:depth]  # type: ignore[index]
        copied.tail = tail_of(copied.module, shared=True)
        return copied


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


def load_backbone(config: BackboneConfig) -> TimmBackbone:
    """Build the backbone that the configuration names, with its weights, on the CPU."""
    return TimmBackbone(*load_model(config), config.image_size)


def empty_backbone(name: str, model_kwargs: Mapping[str, Any]) -> TimmBackbone:
    """A timm backbone without weights, on the meta device: depth, width and token layout, even of ViT-g, for free."""
    kwargs = dict(model_kwargs)
    return TimmBackbone(name, kwargs, build_empty(name, kwargs), None)


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
        return prefix[:, :1]
    if how == "mean":
        return patches.mean(dim=1, keepdim=True)
    assert isinstance(how, Pool)
    height, width = layout.grid
    shape = (len(patches), height // how.pool, how.pool, width // how.pool, how.pool, -1)
    squares = patches.reshape(shape)
    return torch.cat([prefix, squares.mean(dim=(2, 4)).flatten(1, 2)], dim=1)
