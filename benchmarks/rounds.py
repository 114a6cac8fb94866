"""Contestants in turn, round after round, so that what else the machine does befalls all of them alike."""

import time
from collections.abc import Callable, Mapping


def compare(
    contestants: Mapping[str, Callable[[], object]], rounds: int, before: Mapping[str, Callable[[], None]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each, by round, in turning order; what comes before some of them is off the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            (before or {}).get(name, lambda: None)()
            started = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds
