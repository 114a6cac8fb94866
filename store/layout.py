"""Computes the layout of shards, tokens and layers; no I/O.

A shard is `shard_samples` consecutive rows of one split in every layer; it is written, committed and retried whole.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from store.config import Every, Last, Layers, Pool, Spread, Tokens
from store.errors import UserError


@dataclass(frozen=True)
class Shards:
    """The shards of one split; iterates over their numbers."""

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
    """The token axis: `num_prefix_tokens`, then the patch grid in row-major order.

    Attributes:
        grid: (height, width), for videos (time, height, width).
        prefix_sets: frames that have their own prefix tokens; these are sets of equal length, frame after frame.
        num_class_tokens: class tokens among the prefix tokens, the first ones of every set (two for a distilled DeiT:
            class and distillation token); the others are registers.

    Raises:
        UserError: there are more class tokens than prefix tokens, or sets of unequal length.
    """

    num_prefix_tokens: int
    grid: tuple[int, ...]
    prefix_sets: int = 1
    num_class_tokens: int = field(kw_only=True)

    def __post_init__(self) -> None:
        sets = self.prefix_sets
        if not 0 <= self.num_class_tokens <= self.num_prefix_tokens:
            raise UserError(f"a token layout has 0 to num_prefix_tokens class tokens, got {self}")
        if min(*self.grid, sets, sets) < 1:
            raise UserError(f"a token layout has at least one set and at least one patch a side, got {self}")
        if self.num_prefix_tokens % sets or self.num_class_tokens % sets:
            raise UserError(f"the prefix tokens of a token layout are sets of equal length, got {self}")

    @property
    def num_patches(self) -> int:
        """The number of patch tokens; 0 if the grid is empty."""
        return math.prod(self.grid) if self.grid else 0

    @property
    def is_video(self) -> bool:
        """Whether the grid has a time axis."""
        return len(self.grid) == 3

    @property
    def num_tokens(self) -> int:
        """Length of the token axis."""
        return self.num_prefix_tokens + self.num_patches


def describe_tokens(tokens: Tokens) -> str:
    """`store.tokens` as text, for the provenance."""
    return tokens if isinstance(tokens, str) else tokens.model_dump_json(exclude_defaults=True)


def reduced_layout(layout: TokenLayout, tokens: Tokens) -> TokenLayout:
    """The layout of a backbone's tokens after they are reduced by `store.tokens`.

    Raises:
        UserError: the backbone has no class token; the grid, or the number of frames, is not divisible.
    """
    if tokens == "all":
        return layout
    mean = (1,) * len(layout.grid)
    if tokens == "mean":
        return TokenLayout(0, mean, num_class_tokens=0)
    if tokens in ("cls", "cls_mean"):
        n_class = layout.num_class_tokens
        if n_class == 0:
            registers = (
                f" ({layout.num_prefix_tokens} registers are not class tokens)" if layout.num_prefix_tokens else ""
            )
            raise UserError(
                f"store.tokens is {tokens!r}, but this backbone has no class token{registers}; "
                "legal here: all, mean, {pool: k}" + (", {time: m}" if layout.is_video else "")
            )
        grid = () if tokens == "cls" else mean
        return TokenLayout(n_class, grid, layout.prefix_sets, num_class_tokens=n_class)
    assert isinstance(tokens, Pool)
    _require_division(layout, tokens)
    grid = tuple(cells_a_side(layout, tokens))
    fewer = tokens.time if layout.prefix_sets > 1 else 1  # sets are averaged like their frames
    return TokenLayout(
        layout.num_prefix_tokens // fewer,
        grid,
        layout.prefix_sets // fewer,
        num_class_tokens=layout.num_class_tokens // fewer,
    )


def cells_a_side(layout: TokenLayout, pool: Pool) -> list[int]:
    """The number of cells along each axis of the grid, each of which is averaged to a token.

    With `pool.grid` = n a side of more than n patches gets as many cells as its largest divisor above n / 2 and up to
    n, so that they are alike, else n cells that overlap.
    """
    frames, square = (layout.grid[:1], layout.grid[1:]) if layout.is_video else ((), layout.grid)
    return [side // pool.time for side in frames] + [_cells(side, pool) for side in square]


def _cells(side: int, pool: Pool) -> int:
    if pool.grid is None:
        return side // pool.pool
    most = min(pool.grid, side)
    return next((cells for cells in range(most, most // 2, -1) if side % cells == 0), most)


def _require_division(layout: TokenLayout, tokens: Pool) -> None:
    if tokens.time > 1 and not layout.is_video:
        raise UserError(f"store.tokens averages {tokens.time} frames, but the samples are images; leave `time` out")
    frames, square = (layout.grid[:1], layout.grid[1:]) if layout.is_video else ((), layout.grid)
    if not _divides(tokens.pool, square):
        raise UserError(
            f"store.tokens pools by {tokens.pool}, which does not divide the grid {square}; legal: {_divisors(square)}"
        )
    if not _divides(tokens.time, frames):
        raise UserError(
            f"store.tokens averages {tokens.time} frames, which does not divide the {frames[0]} frames; "
            f"legal for `time`: {_divisors(frames)}"
        )


def _divides(part: int, sides: tuple[int, ...]) -> bool:
    return all(side % part == 0 for side in sides)


def _divisors(sides: tuple[int, ...]) -> list[int]:
    return [part for part in range(2, max(sides) + 1) if _divides(part, sides)]


def resolve_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """Absolute, ascending block indices for `store.layers`; negative indices count from the end.

    >>> resolve_layers(Every(every=4), 12)
    (3, 7, 11)
    >>> resolve_layers(Spread(spread=4), 40)
    (9, 19, 29, 39)
    """
    if layers == "all":
        return tuple(range(depth))
    if isinstance(layers, Spread):
        layers = Every(every=math.ceil(depth / layers.spread))
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


def in_groups(items: Sequence[Any] | Any, size: int) -> list[Any]:
    """Slices of a sequence or array in order, `size` items each; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
