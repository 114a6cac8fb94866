"""Pure arithmetic of shards and token grids; no I/O.

A shard is `shard_samples` consecutive rows of one split, in every layer: the unit of writing, commitment and retry.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from store.config import Every, Last, Layers, Pool, Tokens
from store.errors import UserError


@dataclass(frozen=True)
class Shards:
    """How the rows of one split fall into shards."""

    num_samples: int
    shard_samples: int

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.shard_samples < 1:
            raise UserError(f"shards need num_samples >= 0 and shard_samples >= 1, got {self}")

    def __len__(self) -> int:
        return -(-self.num_samples // self.shard_samples)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def rows(self, shard: int) -> range:
        """The rows of one shard; the last shard may be short."""
        if not 0 <= shard < len(self):
            raise UserError(f"shard {shard} does not exist: there are {len(self)}, numbered from 0")
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.num_samples))


@dataclass(frozen=True)
class TokenLayout:
    """The token axis: `num_prefix_tokens` (class token, registers), then the patch grid in row-major order."""

    num_prefix_tokens: int
    grid: tuple[int, ...]

    @property
    def num_patches(self) -> int:
        """Patch tokens; 0 where the grid is empty."""
        return math.prod(self.grid) if self.grid else 0

    @property
    def num_tokens(self) -> int:
        """Length of the token axis."""
        return self.num_prefix_tokens + self.num_patches


def describe_tokens(tokens: Tokens) -> str:
    """`store.tokens` as the text that provenance keeps."""
    return tokens if isinstance(tokens, str) else tokens.model_dump_json()


def reduced_layout(layout: TokenLayout, tokens: Tokens) -> TokenLayout:
    """The layout that `store.tokens` leaves of a backbone's layout."""
    if tokens == "all":
        return layout
    if tokens == "mean":
        return TokenLayout(0, (1,) * len(layout.grid))
    if tokens == "cls":
        if layout.num_prefix_tokens == 0:
            raise UserError(
                "store.tokens is 'cls', but this backbone has no class token; legal here: all, mean, {pool: k}"
            )
        return TokenLayout(1, ())
    assert isinstance(tokens, Pool)
    if any(side % tokens.pool for side in layout.grid):
        legal = [k for k in range(2, max(layout.grid) + 1) if not any(side % k for side in layout.grid)]
        raise UserError(
            f"store.tokens pools by {tokens.pool}, which does not divide the grid {layout.grid}; legal: {legal}"
        )
    return TokenLayout(layout.num_prefix_tokens, tuple(side // tokens.pool for side in layout.grid))


def resolve_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """Absolute, ascending block indices for `store.layers`; negative indices count from the end.

    >>> resolve_layers(Every(every=4), 12)
    (3, 7, 11)
    """
    if layers == "all":
        return tuple(range(depth))
    if isinstance(layers, Every):
        return tuple(range((depth - 1) % layers.every, depth, layers.every))
    if isinstance(layers, Last):
        if layers.last > depth:
            raise UserError(f"store.layers asks for the last {layers.last} layers, but this backbone has {depth}")
        return tuple(range(depth - layers.last, depth))
    assert isinstance(layers, list)
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise UserError(f"layers {wrong or '[]'} do not exist: this backbone has {depth}, numbered 0 to {depth - 1}")
    return tuple(sorted({layer % depth for layer in layers}))
