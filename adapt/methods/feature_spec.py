"""Describes the tokens that a method reads, so that methods need not know where their features come from."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from store.layout import TokenLayout

TokensByLayer = dict[int, Float[Tensor, "batch tokens dim"]]


@runtime_checkable
class PreLogits(Protocol):
    """The frozen part of a backbone between its last block and its classifier: final norm and pooling.

    Attributes:
        reads_patches: whether its pooling reads patch tokens.
        unavailable: why the backbone has no pooling; empty if it has one.
    """

    reads_patches: bool
    unavailable: str

    def normalize(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Apply the final norm."""
        ...

    def can_pool(self, layout: TokenLayout) -> bool:
        """Whether tokens of this layout include all that `pool` reads."""
        ...

    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool normalized tokens as the backbone does."""
        ...

    def normalize_pooled(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Apply the norm that some backbones have after their pooling."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Layers, shape and final norm of the tokens that a method reads.

    Args:
        layers: absolute block indices, ascending.
        depth: number of blocks of the backbone.
        dim: width of a token.
        layout: prefix tokens and patch grid.
        pre_logits: the backbone's final norm and pooling.
    """

    layers: tuple[int, ...]
    depth: int
    dim: int
    layout: TokenLayout
    pre_logits: PreLogits


class TokenBatch(dict[int, Tensor]):
    """The tokens of a batch by layer, which remember what all models compute of them alike.

    Tokens and backbone are frozen, so these values have no gradient. They are kept as long as the batch.
    """

    def __init__(self, tokens: TokensByLayer) -> None:
        super().__init__(tokens)
        self._remembered: dict[Hashable, Tensor] = {}
        self._prefixes: dict[int, TokenBatch] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the batch."""
        return tuple(self)

    @classmethod
    def of(cls, tokens: TokensByLayer) -> "TokenBatch":
        """The tokens themselves if they remember already, else a batch that does."""
        return tokens if isinstance(tokens, cls) else cls(tokens)

    def prefix(self, size: int) -> "TokenBatch":
        """The first tokens of every sample."""
        if size not in self._prefixes:
            self._prefixes[size] = TokenBatch({layer: tokens[:, :size] for layer, tokens in self.items()})
        return self._prefixes[size]

    def select(self, rows: Int64[Tensor, "rows"]) -> "TokenBatch":
        """Some samples of the batch, which take what it remembers already; tokens are copied when they are read."""
        return _SelectedTokens(self, rows)

    def layer_norm(self, layer: int) -> Float[Tensor, "batch tokens dim"]:
        """Tokens after a LayerNorm without parameters."""
        return self.remember("layer_norm", layer, lambda: F.layer_norm(self[layer], self[layer].shape[-1:]))

    def normalized(self, layer: int, pre_logits: PreLogits) -> Float[Tensor, "batch tokens dim"]:
        """Tokens after the backbone's final norm."""
        return self.remember(("normalized", pre_logits), layer, lambda: pre_logits.normalize(self[layer]))

    def remember(self, name: Hashable, layer: int, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returned when it was first called for this name, layer and precision of autocast."""
        key = name, layer, autocast_dtype(self[layer])
        if key not in self._remembered:
            self._remembered[key] = compute()
        return self._remembered[key]


class _SelectedTokens(TokenBatch):
    """Some samples of a batch."""

    def __init__(self, batch: TokenBatch, rows: Int64[Tensor, "rows"]) -> None:
        super().__init__({})
        self._batch, self._rows = batch, rows

    @property
    def layers(self) -> tuple[int, ...]:
        return self._batch.layers

    def __missing__(self, layer: int) -> Tensor:
        self[layer] = self._batch[layer][self._rows]
        return self[layer]

    def prefix(self, size: int) -> TokenBatch:
        if size not in self._prefixes:
            self._prefixes[size] = _SelectedTokens(self._batch.prefix(size), self._rows)
        return self._prefixes[size]

    def layer_norm(self, layer: int) -> Tensor:
        return self.remember("layer_norm", layer, lambda: self._batch.layer_norm(layer)[self._rows])

    def normalized(self, layer: int, pre_logits: PreLogits) -> Tensor:
        name = ("normalized", pre_logits)
        return self.remember(name, layer, lambda: self._batch.normalized(layer, pre_logits)[self._rows])


def autocast_dtype(tokens: Float[Tensor, "..."]) -> torch.dtype:
    """The type that autocast multiplies tokens in; without autocast it is their own."""
    device = tokens.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else tokens.dtype
