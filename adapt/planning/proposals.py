"""Proposes smaller stores that fit a number of bytes, with what they have cost in accuracy where it was measured.

The prices are those of benchmarks/reductions.py on one small backbone; a pilot tells those of the job's own samples.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from adapt.planning.job_facts import JobFacts
from store.config import PRESETS, Dtype, StoreConfig
from store.dtypes import block_size, bytes_per_token
from store.schema import Schema

_PRICES = Path(__file__).with_name("preset_prices.json")
_OPTIONS = ("layers", "tokens", "dtype")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A store that fits.

    Args:
        name: `int8` or `int4` (the configured layers and tokens in one byte a value, or half of one), a preset, or
            `train` (the configured store without the test split).
        overrides: for the command line, each after its `-o`.
        cost: points of accuracy that it has cost, by what the class is a matter of.
    """

    name: str
    overrides: tuple[str, ...]
    bytes_per_sample: int
    store_bytes: int
    cost: str


def propose(job: JobFacts, rows: Mapping[str, int], n_bytes: int) -> list[Proposal]:
    """Stores of so many rows by split that take at most `n_bytes`, and that all methods of the job can train from.

    The largest comes first: it has all that the smaller ones have, and more.
    """
    configured, seen = job.config.store, list[Schema]()
    proposals, n_rows = list(_without_test(job, rows, n_bytes)), sum(rows.values())
    for name, smaller in _smaller_stores(configured, job.shape.dim):
        schema = job.schema_of(smaller)
        bytes_per_sample = schema.bytes_per_sample
        if bytes_per_sample * n_rows > n_bytes or schema in seen or not job.can_train_from(smaller):
            continue
        seen.append(schema)
        proposals.append(
            Proposal(
                name=name,
                overrides=tuple(_overrides(name, configured, smaller)),
                bytes_per_sample=bytes_per_sample,
                store_bytes=bytes_per_sample * n_rows,
                cost=describe_price(name),
            )
        )
    return sorted(proposals, key=lambda proposal: -proposal.bytes_per_sample)


def _without_test(job: JobFacts, rows: Mapping[str, int], n_bytes: int) -> Iterator[Proposal]:
    """A new store as it is configured, without the test split, if that fits."""
    stored = sum(n for split, n in rows.items() if split != "test")
    bytes_per_sample = job.schema.bytes_per_sample
    if job.store is None and rows.get("test") and bytes_per_sample * stored <= n_bytes:
        yield Proposal(
            name="train",
            overrides=("store.splits=[train]",),
            bytes_per_sample=bytes_per_sample,
            store_bytes=bytes_per_sample * stored,
            cost="none; every job runs the test samples through the backbone once",
        )


def _smaller_stores(configured: StoreConfig, dim: int) -> Iterator[tuple[str, StoreConfig]]:
    codes: tuple[Dtype, ...] = ("int8", "int4") if block_size(dim) else ("int8",)
    for dtype in codes:
        if bytes_per_token(dtype, dim) < bytes_per_token(configured.dtype, dim):
            yield dtype, configured.model_copy(update={"dtype": dtype})
    for preset in PRESETS:
        options = StoreConfig.model_validate({"preset": preset})
        yield preset, configured.model_copy(update={key: getattr(options, key) for key in _OPTIONS})


def _overrides(name: str, configured: StoreConfig, smaller: StoreConfig) -> Iterator[str]:
    """The preset, unless options that the user gave would take precedence over it."""
    if name in PRESETS and not configured.model_fields_set & set(_OPTIONS):
        yield f"store.preset={name}"
        return
    for key in _OPTIONS:
        value = getattr(smaller, key)
        if value != getattr(configured, key):
            yield f"store.{key}={_as_yaml(value)}"


def _as_yaml(value: Any) -> str:
    plain = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
    return str(plain).replace("'", "")


@cache
def _prices() -> dict[str, dict[str, dict[str, float]]]:
    prices: dict[str, dict[str, dict[str, float]]] = json.loads(_PRICES.read_text())
    return prices


def describe_price(name: str) -> str:
    """What a store has cost against the full one, such as `0.3 ± 0.4 points where ...`; `full` costs nothing."""
    prices = _prices().get(name, {})
    return ", ".join(f"{price['points']:.1f} ± {price['error']:.1f} ({kind})" for kind, price in prices.items())
