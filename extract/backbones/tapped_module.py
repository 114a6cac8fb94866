"""A user's own module as a backbone, and by what its values are known again."""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.backbones.pre_logits import Tail
from extract.backbones.preprocessing import Transform
from extract.backbones.timm_vit import TokensByLayer
from store.errors import UserError
from store.layout import TokenLayout

Images = Float[Tensor, "batch ..."]  # (batch, channels, height, width), or clips (batch, frames, channels, ...)
Tap = Callable[[nn.Module, Images], Mapping[int, Float[Tensor, "batch tokens dim"]]]


class TappedBackbone:
    """A user's own module. `tap(module, images)` returns its tokens by absolute layer index.

    Args:
        module: any frozen module, on the CPU.
        tap: maps (module, images (batch, ...)) to {layer: (batch, tokens, dim)}; prefix tokens first.
        transform: turns one sample of the dataset into a tensor; the identity by default.
        num_prefix_tokens: how many tokens stand before the patch grid.
        num_class_tokens: how many of these are class tokens, which come first; the others are registers, which no
            pooling reads. To be given wherever there are prefix tokens.
        grid: the patch grid (height, width); by default one row of all patch tokens.
        example: one transformed sample, run once to learn the layers and shapes.
        name: how reports call it.

    Raises:
        UserError: what `tap` returns, or the layout given, is no tokens by layer.
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
        num_class_tokens: int | None = None,
    ) -> None:
        self.module, self._tap, self.name = module.eval().requires_grad_(False), tap, name
        self.model_kwargs: dict[str, Any] = {}
        self.transform = transform or torch.as_tensor
        self.image_size, self.preprocessing = tuple(example.shape), _stable_repr(transform)
        self._probe, self._source = _pattern(example), _source(self.transform)
        with torch.no_grad():
            tokens = tap(module, example[None])
        if not all(isinstance(layer, int) and layer >= 0 for layer in tokens):
            raise UserError(f"tap must return tokens by layer index, from 0 on, got the keys {list(tokens)}")
        shapes = {tuple(values.shape[1:]) for values in tokens.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise UserError(f"tap must return one (batch, tokens, dim) shape for every layer, got {sorted(shapes)}")
        num_tokens, self.dim = next(iter(shapes))
        self.depth = max(tokens) + 1
        if num_class_tokens is None and num_prefix_tokens:
            raise UserError(
                f"num_prefix_tokens is {num_prefix_tokens}: say how many of these are class tokens; legal for "
                f"num_class_tokens: 0 to {num_prefix_tokens}"
            )
        self.layout = TokenLayout(
            num_prefix_tokens, grid or (1, num_tokens - num_prefix_tokens), num_class_tokens=num_class_tokens or 0
        )
        if self.layout.num_tokens != num_tokens:
            raise UserError(f"tap returned {num_tokens} tokens, but {self.layout} has {self.layout.num_tokens}")

    def tokens(self, images: Images, layers: Sequence[int]) -> TokensByLayer:
        """See `Backbone.tokens`."""
        tokens = self._tap(self.module, images)
        if missing := set(layers) - set(tokens):
            raise UserError(f"tap returned layers {sorted(tokens)}, not {sorted(missing)}")
        return {layer: tokens[layer] for layer in sorted(layers)}

    @torch.no_grad()
    def tap_digest(self) -> str:
        """What `tap` makes of a fixed pattern, as a few numbers of every layer.

        In float64, so that their leading digits are the same on every machine; in the module's own precision where
        module or tap cannot, and then of fewer digits.
        """
        try:
            tokens = self._tap(copy.deepcopy(self.module).cpu().double(), _as_double(self._probe)[None])
            return _summary(tokens, digits=6)
        except Exception:  # of a function that is not ours
            device = next(iter(self.module.state_dict().values()), self._probe).device
            return _summary(self._tap(self.module, self._probe[None].to(device)), digits=2)

    def preprocessing_digest(self) -> str:
        """What the transform makes of a fixed pattern, for one that takes no image; its source for one of neither."""
        try:
            values = torch.as_tensor(self.transform(_as_double(self._probe)))  # type: ignore[arg-type]
            return _summary({0: values}, digits=4)
        except Exception:  # as above
            return blake2b(self._source.encode(), digest_size=16).hexdigest()


def _pattern(example: Tensor) -> Tensor:
    """Values that differ, the same in every process, in the example's shape; of indices those of the example."""
    values = (7919 * torch.arange(example.numel()) % 251).reshape(example.shape)
    if example.is_floating_point():
        return (values - 125).to(example.dtype) / 50
    return values.to(torch.uint8) if example.dtype == torch.uint8 else example.detach().cpu()


def _as_double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values.clone()


def _summary(tokens: Mapping[int, Tensor], digits: int) -> str:
    """A digest of every layer's size, root mean square, and mean under fixed weights of both signs."""
    lines = []
    for layer, values in sorted(tokens.items()):
        flat = values.detach().cpu().double().flatten()
        size = float(flat.square().mean().sqrt())
        signed = torch.where(7919 * torch.arange(len(flat)) % 251 < 125, 1.0, -0.5).double()
        mean = float((flat * signed).mean()) / (size or 1.0)
        lines.append(f"{layer} {tuple(values.shape)} {size:.{digits}g} {round(mean, digits) + 0.0}")
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _source(transform: object) -> str:
    try:
        return inspect.getsource(transform)  # type: ignore[arg-type]
    except (OSError, TypeError):  # an object, or typed in where nothing keeps the text
        return _stable_repr(transform)


def _stable_repr(transform: object) -> str:
    """A function's or object's text without its address, which is another one in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
