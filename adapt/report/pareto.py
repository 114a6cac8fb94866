"""Finds the Pareto front of methods: those that no other method beats in cost and accuracy at once."""

from collections.abc import Sequence

Point = tuple[float, float]  # cost, of which less is better, and accuracy


def front_of(points: Sequence[Point]) -> list[int]:
    """Positions of the points on the front, by rising cost; of equal points all are on it."""
    on_front = [k for k, point in enumerate(points) if not any(_dominates(other, point) for other in points)]
    return sorted(on_front, key=lambda k: points[k])


def _dominates(a: Point, b: Point) -> bool:
    return a != b and a[0] <= b[0] and a[1] >= b[1]
