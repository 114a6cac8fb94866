"""Proposes smaller stores that fit a number of bytes, with the least expected loss of accuracy first.

The order is an expectation, not a measurement; where the loss has been measured, the proposal quotes it.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from adapt.planning.job_facts import JobFacts
from store.config import Dtype, Every, Layers, Pool, StoreConfig, Tokens
from store.dtypes import bytes_per_token
from store.errors import UserError
from store.layout import TokenLayout, reduced_layout, resolve_layers

# Expected harm of each change; only the order of their sums counts.
_NARROWER: dict[Dtype, tuple[int, str]] = {
    "float16": (1, "changes a token by 0.02% (docs/formats.md), accuracy not measured"),
    "int8": (2, "changes a token by 0.63 to 1.11% (docs/formats.md), accuracy not measured"),
}
_HARM_OF_EVERY = {2: 3, 4: 8, 8: 16}  # of every k-th of the layers
_HARM_OF_POOLING, _HARM_OF_MEAN = 3, 99  # the first is multiplied by side and time of the pool
_SIDES, _TIMES = range(1, 9), (1, 2, 4)
_MOST_PROPOSALS = 5

_NOT_MEASURED = "accuracy not measured"
_EVERY_SECOND = "LoSA gains 1.58 ± 1.24 from all of 12 layers over every second (docs/ablation.md)"
_MEAN_ALONE = "linear probe 79.9 from the mean alone, 82.7 with the class token (docs/ablation.md); LoSA not measured"


@dataclass(frozen=True)
class Change:
    """A value for one key of `store:`; without a cost it is the configured value."""

    key: str
    value: Any
    harm: int = 0
    cost: str = ""

    @property
    def override(self) -> str:
        """The change as the command line takes it after `-o`."""
        value = self.value.model_dump(exclude_defaults=True) if isinstance(self.value, BaseModel) else self.value
        return f"store.{self.key}={str(value).replace(chr(39), '')}"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A store that fits.

    Args:
        overrides: for the command line, each after its `-o`.
        costs: the known loss of accuracy of each override.
    """

    overrides: tuple[str, ...]
    bytes_per_sample: int
    store_bytes: int
    costs: tuple[str, ...]


def propose(job: JobFacts, rows: int, n_bytes: int) -> list[Proposal]:
    """Stores for so many rows that take at most `n_bytes`, and that all methods of the job can train from.

    The least harmful comes first. A store is left out if it makes all changes of an earlier one and more.
    """
    store = job.config.store
    chosen: list[tuple[Change, ...]] = []
    proposals: list[Proposal] = []
    for changes in sorted(_combinations(job), key=lambda changes: sum(change.harm for change in changes)):
        smaller = store.model_copy(update={change.key: change.value for change in changes})
        bytes_per_sample = job.schema_of(smaller).bytes_per_sample
        fits = bytes_per_sample * rows <= n_bytes and not any(_includes(changes, other) for other in chosen)
        if fits and job.can_train_from(smaller):
            chosen.append(changes)
            proposals.append(_proposal(changes, bytes_per_sample, rows))
    return proposals[:_MOST_PROPOSALS]


def _proposal(changes: tuple[Change, ...], bytes_per_sample: int, rows: int) -> Proposal:
    costly = [change for change in changes if change.cost]
    return Proposal(
        overrides=tuple(change.override for change in costly),
        bytes_per_sample=bytes_per_sample,
        store_bytes=bytes_per_sample * rows,
        costs=tuple(change.cost for change in costly),
    )


def _includes(changes: tuple[Change, ...], other: tuple[Change, ...]) -> bool:
    return all(mine.harm >= its.harm for mine, its in zip(changes, other, strict=True))


def _combinations(job: JobFacts) -> Iterator[tuple[Change, ...]]:
    store: StoreConfig = job.config.store
    dtypes, layers = _dtypes(store.dtype), _layers(store.layers, job.shape.depth)
    return itertools.product(dtypes, layers, _tokens(store.tokens, job.shape.layout))


def _dtypes(dtype: Dtype) -> list[Change]:
    width = bytes_per_token(dtype, 1024)
    narrower = [(name, *harm_and_cost) for name, harm_and_cost in _NARROWER.items()]
    changes = [Change("dtype", *change) for change in narrower if bytes_per_token(change[0], 1024) < width]
    return [Change("dtype", dtype), *changes]


def _layers(layers: Layers, depth: int) -> list[Change]:
    stored = resolve_layers(layers, depth)
    spacing = None  # of the stored layers, if it is regular
    if layers == "all":
        spacing = 1
    elif isinstance(layers, Every):
        spacing = layers.every
    changes = [Change("layers", layers)]
    for step, harm in _HARM_OF_EVERY.items():
        if step < len(stored):
            fewer = Every(every=spacing * step) if spacing else sorted(stored[::-step])
            cost = _EVERY_SECOND if (spacing, step) == (1, 2) else _NOT_MEASURED
            changes.append(Change("layers", fewer, harm, cost))
    return changes


def _tokens(tokens: Tokens, layout: TokenLayout) -> list[Change]:
    """Coarser tokens.

    Args:
        layout: of all tokens of the backbone.
    """
    unchanged = Change("tokens", tokens)
    if tokens in ("cls", "mean", "cls_mean") or layout.num_patches < 2:
        return [unchanged]
    configured = tokens if isinstance(tokens, Pool) else None
    pooled = []
    for side, time in itertools.product(_SIDES, _TIMES):
        pool = {
            "pool": side * (configured.pool if configured else 1),
            "time": time * (configured.time if configured else 1),
        }
        if side * time > 1 and _divides(layout, Pool(**pool)):
            pooled.append(Change("tokens", Pool(**pool), _HARM_OF_POOLING * side * time, _NOT_MEASURED))
    return [unchanged, *pooled, Change("tokens", "mean", _HARM_OF_MEAN, _MEAN_ALONE)]


def _divides(layout: TokenLayout, pool: Pool) -> bool:
    """Whether the pool divides the grid of patches."""
    with suppress(UserError):
        return reduced_layout(layout, pool).num_patches > 0
    return False
