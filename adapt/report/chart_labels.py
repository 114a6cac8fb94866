"""Labels of a chart, each at the nearest free place around its point."""

from collections.abc import Sequence
from dataclasses import dataclass

POINTS_A_CHARACTER, POINTS_A_LINE = 5.0, 11.0  # on average


@dataclass(frozen=True)
class Box:
    """A rectangle in points; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)

    def contains(self, other: "Box") -> bool:
        wide = self.left <= other.left and other.right <= self.right
        return wide and self.bottom <= other.bottom and other.top <= self.top


def place_label(x: float, y: float, width: float, frame: Box, taken: Sequence[Box]) -> Box:
    """The first free box beside, above or below a point, further and further away; else the one on its right."""
    for step in range(24):
        for dy in (step * POINTS_A_LINE / 2, -step * POINTS_A_LINE / 2):
            for left in (x - width / 2, x + 8, x - 8 - width):
                place = Box(left, y + dy - POINTS_A_LINE / 2, left + width, y + dy + POINTS_A_LINE / 2)
                if frame.contains(place) and not any(place.overlaps(other) for other in taken):
                    return place
    return Box(x + 8, y - POINTS_A_LINE / 2, x + 8 + width, y + POINTS_A_LINE / 2)
