"""Times contestants in interleaved rounds, so that other work on the machine disturbs all of them alike."""

import time
from collections.abc import Callable, Mapping


def compare(
    contestants: Mapping[str, Callable[[], object]], rounds: int, before: Mapping[str, Callable[[], None]] | None = None
) -> dict[str, list[float]]:
    """Time every contestant once in each round, in alternating order.

    Args:
        contestants: what to time.
        rounds: how often.
        before: calls that prepare some of the contestants, which are not timed.

    Returns:
        name -> seconds of every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            (before or {}).get(name, lambda: None)()
            started = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds
