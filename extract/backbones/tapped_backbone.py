"""Makes a backbone of a user's own module, and computes digests that identify what it computes."""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.pre_logits import PreLogits
from extract.backbones.preprocessing import Transform
from extract.backbones.timm_vit import TokensByLayer
from store.errors import UserError
from store.layout import TokenLayout

Images = Float[Tensor, "batch ..."]  # (batch, channels, height, width), or clips (batch, frames, channels, ...)
Tap = Callable[[nn.Module, Images], Mapping[int, Float[Tensor, "batch tokens dim"]]]


class LayoutOptions(TypedDict, total=False):
    """The layout of the tokens that a tap returns; see `TappedBackbone`."""

    num_prefix_tokens: int
    num_class_tokens: int | None
    grid: tuple[int, ...] | None


class TappedBackbone:
    """A user's own frozen module. `tap(module, images)` returns its tokens by absolute layer index.

    Args:
        module: any module, on the CPU; it is frozen and put into evaluation mode.
        tap: maps (module, images (batch, ...)) to {layer: (batch, tokens, dim)}; prefix tokens first.
        example: one transformed sample, run once to learn the layers and shapes.
        transform: turns one sample of the dataset into a tensor; the identity by default.
        name: of the backbone in reports.
        layout: the layout of the tokens:
            num_prefix_tokens: number of tokens before the patch grid; 0 by default.
            num_class_tokens: how many of these are class tokens, which come first. The others are registers, which no
                pooling reads. Required if there are prefix tokens.
            grid: the patch grid (height, width); one row of all patch tokens by default.

    Raises:
        UserError: the layout does not fit the tokens, or `tap` does not return tokens by layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import sidecache as sc
        >>> module = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        >>> def tap(module, images):
        ...     return {0: module(images).flatten(2).transpose(1, 2)}  # (batch, 16 patches, 16)
        >>> backbone = sc.TappedBackbone(module, tap, example=torch.zeros(3, 32, 32), grid=(4, 4))
        >>> backbone.depth, backbone.dim, backbone.layout.num_tokens
        (1, 16, 16)
    """

    tail: PreLogits | None = None

    def __init__(
        self,
        module: nn.Module,
        tap: Tap,
        example: Float[Tensor, "..."],
        transform: Transform | None = None,
        name: str = "module",
        **layout: Unpack[LayoutOptions],
    ) -> None:
        self.module, self._tap, self.name = module.eval().requires_grad_(False), tap, name
        self.model_kwargs: dict[str, Any] = {}
        self.transform = transform or torch.as_tensor
        self.image_size, self.preprocessing = tuple(example.shape), _repr_without_address(transform)
        # input and source text for the digests
        self._probe, self._source = _pattern(example), _source(self.transform)
        with torch.no_grad():
            tokens = tap(module, example[None])
        num_tokens, self.dim = _require_one_shape(tokens)
        self.depth = max(tokens) + 1
        self.layout = _token_layout(num_tokens, **layout)

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """See `Backbone.tokens`."""
        tokens = self._tap(self.module, images)
        if missing := set(layers) - set(tokens):
            raise UserError(f"tap returned layers {sorted(tokens)}, not {sorted(missing)}")
        return {layer: tokens[layer] for layer in sorted(layers)}

    @torch.no_grad()
    def tap_digest(self) -> str:
        """Digest of what `tap` returns for a fixed pattern.

        In float64 and rounded, so that it is the same on every machine. If module or tap fail in float64, in the
        module's own precision and rounded to fewer digits.
        """
        try:
            tokens = self._tap(copy.deepcopy(self.module).cpu().double(), _as_double(self._probe)[None])
            return _summary(tokens, digits=6)
        except Exception:  # a user's code may raise anything
            device = next(iter(self.module.state_dict().values()), self._probe).device
            return _summary(self._tap(self.module, self._probe[None].to(device)), digits=2)

    def preprocessing_digest(self) -> str:
        """Digest of a transform that does not take images: of its output for a fixed pattern, else of its source."""
        try:
            values = torch.as_tensor(self.transform(_as_double(self._probe)))  # type: ignore[arg-type]
            return _summary({0: values}, digits=4)
        except Exception:  # a user's code may raise anything
            return blake2b(self._source.encode(), digest_size=16).hexdigest()


def _require_one_shape(tokens: Mapping[Any, Tensor]) -> tuple[int, int]:
    """The (tokens, dim) that all layers share; a tap of the user's may return anything."""
    if not all(isinstance(layer, int) and layer >= 0 for layer in tokens):
        raise UserError(f"tap must return tokens by layer index, from 0 on, got the keys {list(tokens)}")
    shapes = {tuple(values.shape[1:]) for values in tokens.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise UserError(f"tap must return one (batch, tokens, dim) shape for every layer, got {sorted(shapes)}")
    num_tokens, dim = next(iter(shapes))
    return num_tokens, dim


def _token_layout(
    num_tokens: int,
    num_prefix_tokens: int = 0,
    num_class_tokens: int | None = None,
    grid: tuple[int, ...] | None = None,
) -> TokenLayout:
    """The layout of `num_tokens` tokens, from the options of `TappedBackbone`."""
    if num_class_tokens is None and num_prefix_tokens:
        raise UserError(
            f"num_prefix_tokens is {num_prefix_tokens}: say how many of these are class tokens; legal for "
            f"num_class_tokens: 0 to {num_prefix_tokens}"
        )
    layout = TokenLayout(
        num_prefix_tokens, grid or (1, num_tokens - num_prefix_tokens), num_class_tokens=num_class_tokens or 0
    )
    if layout.num_tokens != num_tokens:
        raise UserError(f"tap returned {num_tokens} tokens, but {layout} has {layout.num_tokens}")
    return layout


def _pattern(example: Tensor) -> Tensor:
    """Fixed, varying values in the example's shape; the example itself if it holds indices."""
    values = (7919 * torch.arange(example.numel()) % 251).reshape(example.shape)
    if example.is_floating_point():
        return (values - 125).to(example.dtype) / 50
    return values.to(torch.uint8) if example.dtype == torch.uint8 else example.detach().cpu()


def _as_double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values.clone()


def _summary(tokens: Mapping[int, Tensor], digits: int) -> str:
    """A digest of every layer's shape, root mean square, and mean under fixed weights of both signs."""
    lines = []
    for layer, values in sorted(tokens.items()):
        flat = values.detach().cpu().double().flatten()
        rms = float(flat.square().mean().sqrt())
        weights = torch.where(7919 * torch.arange(len(flat)) % 251 < 125, 1.0, -0.5).double()
        mean = float((flat * weights).mean()) / (rms or 1.0)
        lines.append(f"{layer} {tuple(values.shape)} {rms:.{digits}g} {round(mean, digits) + 0.0}")
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _source(transform: object) -> str:
    try:
        return inspect.getsource(transform)  # type: ignore[arg-type]
    except (OSError, TypeError):  # an object, or a function typed into an interpreter
        return _repr_without_address(transform)


def _repr_without_address(transform: object) -> str:
    """The repr without the address, which differs between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
