"""Declares the costs that accuracy is drawn against, and lays out the axis of each: its ends and its ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapt.report.seed_averages import Summary

_MOST_TICKS = 6
_SHARED_MEMORY = " Methods that were trained in one pass share its memory."


@dataclass(frozen=True, kw_only=True)
class CostAxis:
    """A cost of a method.

    Args:
        field: of `Row`.
        name: what the axis shows, with its unit.
        unit: what a value is divided by.
        is_log: whether the axis is logarithmic.
        more_is_better: whether large values are good ones, as of a speed.
        least: how many methods must have a value.
        note: a sentence below the chart.
    """

    field: str
    name: str
    unit: int = 1
    is_log: bool = True
    more_is_better: bool = False
    least: int = 2
    note: str = ""

    def value(self, summary: Summary) -> float | None:
        """The cost of a method; None where it is unknown."""
        value = summary.costs[self.field]
        return None if value is None else value / self.unit


COST_AXES = (
    CostAxis(field="trainable_params", name="trained parameters, without the head", least=1),
    CostAxis(field="peak_memory_bytes", name="training memory (MiB)", unit=2**20, note=_SHARED_MEMORY),
    CostAxis(field="samples_per_second", name="training speed (samples/s)", more_is_better=True),
    CostAxis(field="inference_gflops", name="inference (GFLOPs an image)", is_log=False),
)


@dataclass(frozen=True)
class Tick:
    """A tick of an axis."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis.

    Args:
        low: its left end; places are decades if it is logarithmic.
        high: its right end.
        ticks: its ticks.
        is_log: whether it is logarithmic.
        zero: where 0 is on a logarithmic axis, one decade before the smallest value; None where no value is 0.
    """

    low: float
    high: float
    ticks: tuple[Tick, ...]
    is_log: bool
    zero: float | None = None

    @property
    def note(self) -> str:
        """What the label of the axis adds."""
        if not self.is_log:
            return ""
        return ", log" if self.zero is None else ", log and 0"

    def place(self, value: float) -> float:
        """Where a value is."""
        if not self.is_log:
            return value
        if value > 0:
            return math.log10(value)
        assert self.zero is not None
        return self.zero


def scale_of(values: Sequence[float], *, is_log: bool) -> Scale:
    """The axis for some values, at least one."""
    return _log_scale(values) if is_log else _linear_scale(values)


def _linear_scale(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    step = _step((high - low + 2 * pad) / _MOST_TICKS)
    first = math.ceil((low - pad) / step)
    ticks = [k * step for k in range(first, first + _MOST_TICKS + 1) if k * step <= high + pad]
    return Scale(
        low=low - pad, high=high + pad, ticks=tuple(Tick(tick, f"{tick:,.6g}") for tick in ticks), is_log=False
    )


def _step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least this large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _log_scale(values: Sequence[float]) -> Scale:
    logs = [math.log10(value) for value in values if value > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    zero = math.floor(low) - 1.0 if len(logs) < len(values) else None
    ticks = [Tick(zero, "0")] if zero is not None else []
    start = low if zero is None else zero
    ticks += [Tick(place, compact(10**place)) for place in _log_ticks(low, high, high - start)]
    pad = max(0.08 * (high - start), 0.15)
    shown = tuple(tick for tick in ticks if start - pad <= tick.place <= high + pad)
    return Scale(low=start - pad, high=high + pad, ticks=shown, is_log=True, zero=zero)


def _log_ticks(low: float, high: float, span: float) -> list[float]:
    """Places of ticks: decades, and multiples of them where the axis spans few."""
    first, last = math.floor(low), math.ceil(high)
    if span < 2.5:
        factors = (1, 2, 5) if span < 1.5 else (1, 3)
        return [k + math.log10(factor) for k in range(first, last + 1) for factor in factors]
    every = math.ceil((last - first + 1) / _MOST_TICKS)
    return [float(k) for k in range(first, last + 1, every)]


def compact(value: float) -> str:
    """A number as `10k`, `2M` or `0.5`."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor * (1 - 1e-9):
            return f"{value / factor:,.4g}{unit}"
    return f"{value:.4g}"
