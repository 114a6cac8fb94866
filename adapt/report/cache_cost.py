"""Says what the cache of a comparison cost, and from which epoch on it pays."""

import math

from adapt.report.comparison import Comparison
from adapt.report.trained_from import FROM_CACHE, trained_from
from store.console.duration import duration


def cache_cost(comparison: Comparison) -> str:
    """One sentence; empty if no method was trained from a cache whose cost is known."""
    cached = [summary for summary in comparison.summaries if trained_from(summary) == FROM_CACHE]
    costs = [summary.costs for summary in cached]
    seconds = max((cost["extract_seconds"] for cost in costs if cost["extract_seconds"] is not None), default=None)
    size = max((cost["store_bytes"] for cost in costs if cost["store_bytes"] is not None), default=None)
    parts = ([] if seconds is None else [duration(seconds)]) + ([] if size is None else [_size(size)])
    if not parts:
        return ""
    epochs = sorted(max(1, math.ceil(e)) for cost in costs if (e := cost["break_even_epochs"]) is not None)
    return f"The cache took {' and '.join(parts)}{_pays(epochs)}."


def _pays(epochs: list[int]) -> str:
    if not epochs:
        return ""
    first, last = _ordinal(epochs[0]), _ordinal(epochs[-1])
    if first == last:
        return f"; it pays from the {first} epoch on"
    return f"; it pays from the {first} to the {last} epoch on, depending on the method"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number:,}{ending}"


def _size(n_bytes: int | float) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes / 2**20:.3g} MiB"
