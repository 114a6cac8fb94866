"""Smaller stores for a budget of bytes, in the order of the harm to be expected; what is measured of it is quoted."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from store.config import Dtype, Every, Layers, Pool, StoreConfig, Tokens
from store.dtypes import bytes_per_token
from store.errors import UserError
from store.layout import TokenLayout, reduced_layout, resolve_layers

# The harm to be expected is an order, no measure.
_NARROWER: dict[Dtype, tuple[int, str]] = {
    "float16": (1, "changes a token by 0.02% (docs/formats.md), accuracy not measured"),
    "int8": (2, "changes a token by 0.63 to 1.11% (docs/formats.md), accuracy not measured"),
}
_THINNER = {2: 3, 4: 8, 8: 16}  # every k-th of the layers
_HARM_OF_POOLING, _HARM_OF_MEAN = 3, 99  # the former for a side of the square, or a frame
_SIDES, _TIMES = range(1, 9), (1, 2, 4)
_MOST = 5  # proposals

_NOT_MEASURED = "accuracy not measured"
_EVERY_SECOND = "LoSA 85.3 from every second of 12 layers, 84.5 from all (docs/ablation.md)"
_MEAN_ALONE = "linear probe 79.9 from the mean alone, 82.7 with the class token (docs/ablation.md); LoSA not measured"


@dataclass(frozen=True)
class Change:
    """A value of one key of `store:`; without a cost it is the value that stands there already."""

    key: str
    value: Any
    harm: int = 0
    cost: str = ""

    @property
    def override(self) -> str:
        """As the command line takes it after `-o`."""
        value = self.value.model_dump(exclude_defaults=True) if isinstance(self.value, BaseModel) else self.value
        return f"store.{self.key}={str(value).replace(chr(39), '')}"


@dataclass(frozen=True)
class Proposal:
    """A store that fits.

    Args:
        overrides: for the command line, each after its `-o`.
        costs: what each of them is known to cost in accuracy.
    """

    overrides: tuple[str, ...]
    bytes_per_sample: int
    store_bytes: int
    costs: tuple[str, ...]


def propose(
    store: StoreConfig,
    size: Callable[[StoreConfig], int],
    layout: TokenLayout,
    depth: int,
    rows: int,
    n_bytes: int,
    works: Callable[[StoreConfig], bool],
) -> list[Proposal]:
    """Stores of at most `n_bytes` for so many rows, the least harmful first, and none that changes more than it needs.

    Args:
        size: bytes of a row of such a store.
        layout: of all of the backbone's tokens.
        works: whether the methods can train from such a store.
    """
    chosen: list[tuple[Change, ...]] = []
    proposals: list[Proposal] = []
    for changes in sorted(_combinations(store, layout, depth), key=lambda changes: sum(c.harm for c in changes)):
        smaller = store.model_copy(update={change.key: change.value for change in changes})
        row = size(smaller)
        fits = row * rows <= n_bytes and not any(_includes(changes, other) for other in chosen)
        if fits and works(smaller):
            chosen.append(changes)
            made = [change for change in changes if change.cost]
            costs = tuple(change.cost for change in made)
            proposals.append(Proposal(tuple(change.override for change in made), row, row * rows, costs))
    return proposals[:_MOST]


def _includes(changes: tuple[Change, ...], other: tuple[Change, ...]) -> bool:
    return all(mine.harm >= its.harm for mine, its in zip(changes, other, strict=True))


def _combinations(store: StoreConfig, layout: TokenLayout, depth: int) -> Iterator[tuple[Change, ...]]:
    return itertools.product(_dtypes(store.dtype), _layers(store.layers, depth), _tokens(store.tokens, layout))


def _dtypes(dtype: Dtype) -> list[Change]:
    wide = bytes_per_token(dtype, 1024)
    narrower = [(name, *known) for name, known in _NARROWER.items() if bytes_per_token(name, 1024) < wide]
    return [Change("dtype", dtype), *(Change("dtype", *known) for known in narrower)]


def _layers(layers: Layers, depth: int) -> list[Change]:
    stored = resolve_layers(layers, depth)
    spacing = 1 if layers == "all" else layers.every if isinstance(layers, Every) else None
    changes = [Change("layers", layers)]
    for step, harm in _THINNER.items():
        if step < len(stored):
            fewer = Every(every=spacing * step) if spacing else sorted(stored[::-step])
            cost = _EVERY_SECOND if (spacing, step) == (1, 2) else _NOT_MEASURED
            changes.append(Change("layers", fewer, harm, cost))
    return changes


def _tokens(tokens: Tokens, layout: TokenLayout) -> list[Change]:
    as_it_is = Change("tokens", tokens)
    if tokens in ("cls", "mean") or layout.num_patches < 2:
        return [as_it_is]
    done = tokens if isinstance(tokens, Pool) else None
    pooled = []
    for side, time in itertools.product(_SIDES, _TIMES):
        pool = {"pool": side * (done.pool if done else 1), "time": time * (done.time if done else 1)}
        if side * time > 1 and _divides(layout, Pool(**pool)):
            pooled.append(Change("tokens", Pool(**pool), _HARM_OF_POOLING * side * time, _NOT_MEASURED))
    return [as_it_is, *pooled, Change("tokens", "mean", _HARM_OF_MEAN, _MEAN_ALONE)]


def _divides(layout: TokenLayout, pool: Pool) -> bool:
    with suppress(UserError):
        return reduced_layout(layout, pool).num_patches > 0
    return False
