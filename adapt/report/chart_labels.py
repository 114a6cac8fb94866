"""Shortens the labels of a chart, and finds a free position for each.

The search is written by hand because textalloc, whose positions are as good, has 1,500 lines in place of these 30 and
measures text with Matplotlib's fonts, while the browser draws it with its own; adjustText covers markers and takes
seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from store.console.visible import visible

POINTS_A_CHARACTER, POINTS_A_LINE = 5.0, 11.0  # on average
_GAP = 8  # points between a marker's center and a label beside it
_MOST_STEPS = 24  # of half a line


def shortened(text: str, longest: int) -> str:
    """A text in one line of at most `longest` characters."""
    text = " ".join(visible(text).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


@dataclass(frozen=True)
class Box:
    """A rectangle in points; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share an area."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)

    def contains(self, other: "Box") -> bool:
        """Whether the other is inside this one."""
        is_inside_x = self.left <= other.left and other.right <= self.right
        return is_inside_x and self.bottom <= other.bottom and other.top <= self.top


def place_label(point: tuple[float, float], width: float, frame: Box, occupied: Sequence[Box]) -> Box:
    """The nearest free box above, below or beside a point; if there is none, the box on the point's right."""
    free = find_place(point, width, frame, occupied, most_steps=_MOST_STEPS)
    return free or _line_box(point[0] + _GAP, point[1], width)


def find_place(
    point: tuple[float, float], width: float, frame: Box, occupied: Sequence[Box], *, most_steps: int
) -> Box | None:
    """The nearest free box above, below or beside a point; None if there is none within so many half lines."""
    x, y = point
    for step in range(most_steps):
        for dy in (step * POINTS_A_LINE / 2, -step * POINTS_A_LINE / 2):
            for left in (x - width / 2, x + _GAP, x - _GAP - width):
                place = _line_box(left, y + dy, width)
                if frame.contains(place) and not any(place.overlaps(other) for other in occupied):
                    return place
    return None


def _line_box(left: float, y: float, width: float) -> Box:
    """The box of one line of text, centered at a height."""
    return Box(left, y - POINTS_A_LINE / 2, left + width, y + POINTS_A_LINE / 2)
