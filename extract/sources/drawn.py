"""Draws images whose class is a matter of structure, not of what is shown: data that need no download.

One task each: `place` (of 16 columns, the one with the shape), `orientation` (of an arrow, in 16 steps around the
circle), `count` (one to eight shapes) and `distance` (between two shapes, in six steps). Everything else varies:
background, its texture, kind, size, color and turn of the shapes, and the place of all where it is not the class. As in
the structured tasks of VTAB (arXiv 1910.04867), on which these are modeled, a class has no typical look.

An image is computed when it is read, from its task, seed, split and row alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from extract.config import DataConfig
from extract.sources.samples import Sample, SourceSamples, content_digest
from extract.sources.splits import choose_splits
from store.errors import UserError

VERSION = 1  # part of every digest: raise it with any change of what is drawn
SIDE = 224  # pixels
N_TRAIN, N_TEST = 1_000, 500
_MARGIN = 4.0  # pixels between shapes, and to the edge
_TRIES = 10_000

Plane = Float[np.ndarray, "height width"]
Draw = np.random.Generator
_X, _Y = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape to draw: kind, center and radius in pixels, turn in radians (0 points right, then clockwise)."""

    kind: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a class means.

    Attributes:
        classes: names, in order.
        place: draws the shapes of an image of a class, by its index.
    """

    classes: tuple[str, ...]
    place: Callable[[int, Draw], list[Shape]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image that is drawn when it is read."""

    task: str
    label: int
    seed: int
    split: Literal["train", "test"]
    row: int

    def decode(self, sample_id: str) -> Image.Image:
        """The image."""
        return Image.fromarray(draw_image(TASKS[self.task].place, self.label, self._draw()))

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over all that decides the pixels."""
        return content_digest(f"drawn {VERSION} {self.task} {self.label} {self.seed} {self.split} {self.row}".encode())

    def _draw(self) -> Draw:
        return np.random.default_rng([self.seed, list(TASKS).index(self.task), self.split == "test", self.row])


def list_drawn(config: DataConfig) -> SourceSamples:
    """1,000 training and 500 test images of the task in `data.source`, such as drawn:place, from `data.split_seed`.

    Raises:
        UserError: there is no such task, or a split is asked for that drawn data do not have.
    """
    name = config.source.partition(":")[2]
    if name not in TASKS:
        raise UserError(f"data.source: drawn:{name} is unknown; legal: {', '.join(f'drawn:{task}' for task in TASKS)}")
    choose_splits(("train", "test"), config)
    classes = TASKS[name].classes

    def draw(split: Literal["train", "test"], n_samples: int) -> list[Sample]:
        rows = [(row, row % len(classes)) for row in range(n_samples)]  # as many of each class as of any other
        return [
            Sample(
                f"{split}/{row:04d}",
                (classes[label],),
                Drawing(name, label, seed=config.split_seed, split=split, row=row),
            )
            for row, label in rows
        ]

    return SourceSamples(name=f"drawn-{name}", train=draw("train", N_TRAIN), test=draw("test", N_TEST), classes=classes)


def draw_image(place: Callable[[int, Draw], list[Shape]], label: int, draw: Draw) -> np.ndarray:
    """The pixels (side, side, 3) of an image of a class."""
    shapes = place(label, draw)
    canvas = _background(draw)
    for shape in shapes:
        color = _contrasting(canvas, shape, draw)
        opacity = np.clip(0.5 - KINDS[shape.kind](*_own_axes(shape)) * shape.radius, 0, 1)[:, :, None]
        canvas = canvas + opacity * (color - canvas)
    grain = draw.normal(0, draw.uniform(0, 8), canvas.shape)
    return np.clip(np.round(canvas + grain), 0, 255).astype(np.uint8)


# Signed distances from a shape's edge, in units of its radius; x and y are in its own axes.


def _disc(x: Plane, y: Plane) -> Plane:
    distance: Plane = np.hypot(x, y) - 1
    return distance


def _ring(x: Plane, y: Plane) -> Plane:
    distance: Plane = np.abs(np.hypot(x, y) - 0.75) - 0.25
    return distance


def _square(x: Plane, y: Plane) -> Plane:
    distance: Plane = np.maximum(np.abs(x), np.abs(y)) - 0.7
    return distance


def _cross(x: Plane, y: Plane) -> Plane:
    bars = [np.maximum(np.abs(a) - 1, np.abs(b) - 0.3) for a, b in ((x, y), (y, x))]
    distance: Plane = np.minimum(*bars)
    return distance


def _triangle(x: Plane, y: Plane) -> Plane:
    sides = [-np.cos(angle) * x - np.sin(angle) * y - 0.5 for angle in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    distance: Plane = np.maximum.reduce(sides)
    return distance


def _arrow(x: Plane, y: Plane) -> Plane:
    shaft = np.maximum(np.abs(x + 0.4) - 0.6, np.abs(y) - 0.16)
    head = np.maximum((x - 1 + 1.3 * np.abs(y)) / np.hypot(1, 1.3), 0.1 - x)
    distance: Plane = np.minimum(shaft, head)
    return distance


KINDS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "arrow": _arrow,
}
_PLAIN = tuple(kind for kind in KINDS if kind != "arrow")


def _own_axes(shape: Shape) -> tuple[Plane, Plane]:
    dx, dy = (_X - shape.x) / shape.radius, (_Y - shape.y) / shape.radius
    cos, sin = np.cos(shape.turn), np.sin(shape.turn)
    return dx * cos + dy * sin, dy * cos - dx * sin


def _background(draw: Draw) -> Float[np.ndarray, "height width 3"]:
    """A gradient between two colors, with waves of another."""
    first, second, third = draw.uniform(0, 255, (3, 3))
    angle = draw.uniform(0, 2 * np.pi)
    along = ((_X * np.cos(angle) + _Y * np.sin(angle)) / SIDE / 2 + 0.5).clip(0, 1)[:, :, None]
    canvas = first + along * (second - first)
    for _ in range(int(draw.integers(0, 4))):
        angle, waves, phase = draw.uniform(0, 2 * np.pi), draw.uniform(1, 14), draw.uniform(0, 2 * np.pi)
        wave = np.sin((_X * np.cos(angle) + _Y * np.sin(angle)) * (2 * np.pi * waves / SIDE) + phase)
        canvas = canvas + draw.uniform(0.05, 0.2) * wave[:, :, None] * (third - canvas)
    return np.asarray(canvas)


def _contrasting(canvas: np.ndarray, shape: Shape, draw: Draw) -> Float[np.ndarray, "3"]:
    """A color that differs from the background under a shape."""
    row, column = (min(int(value), SIDE - 1) for value in (shape.y, shape.x))
    for _ in range(_TRIES):
        color = draw.uniform(0, 255, 3)
        if np.abs(color - canvas[row, column]).mean() > 70:
            return np.asarray(color)
    raise AssertionError("a third of all colors differ enough from any")


def _shape(draw: Draw, *, radius: tuple[float, float], x: float | None = None, y: float | None = None) -> Shape:
    """A shape that is wholly inside the image, at a place that is drawn where none is given."""
    size = draw.uniform(*radius)
    low, high = size + _MARGIN, SIDE - size - _MARGIN
    return Shape(
        kind=str(draw.choice(_PLAIN)),
        x=draw.uniform(low, high) if x is None else x,
        y=draw.uniform(low, high) if y is None else y,
        radius=size,
        turn=draw.uniform(0, 2 * np.pi),
    )


_N_PLACES, _N_TURNS, _MOST, _N_DISTANCES = 16, 16, 8, 6


def _place(label: int, draw: Draw) -> list[Shape]:
    """One shape, its center in a column of the image; at the edge it may be cut."""
    column = SIDE / _N_PLACES
    return [_shape(draw, radius=(10.0, 24.0), x=column * (label + draw.uniform(0, 1)))]


def _orientation(label: int, draw: Draw) -> list[Shape]:
    """One arrow, turned by a step."""
    shape = _shape(draw, radius=(26.0, 60.0))
    turn = (label + draw.uniform(-0.4, 0.4)) * 2 * np.pi / _N_TURNS
    return [Shape(kind="arrow", x=shape.x, y=shape.y, radius=shape.radius, turn=turn)]


def _count(label: int, draw: Draw) -> list[Shape]:
    """Some shapes that do not touch."""
    shapes: list[Shape] = []
    for _ in range(_TRIES):
        new = _shape(draw, radius=(9.0, 20.0))
        if all(_gap(new, other) > _MARGIN for other in shapes):
            shapes.append(new)
        if len(shapes) == label + 1:
            return shapes
    raise AssertionError("eight shapes of at most 20 pixels always find room")


def _distance(label: int, draw: Draw) -> list[Shape]:
    """Two shapes; the step of the distance between their centers."""
    nearest, step = 36.0, 22.0
    for _ in range(_TRIES):
        first, second = (_shape(draw, radius=(8.0, 16.0)) for _ in range(2))
        apart = np.hypot(first.x - second.x, first.y - second.y)
        if nearest + step * label <= apart < nearest + step * (label + 1):
            return [first, second]
    raise AssertionError("every step is common")


def _gap(one: Shape, other: Shape) -> float:
    """Pixels between two shapes at least."""
    return float(np.hypot(one.x - other.x, one.y - other.y)) - one.radius - other.radius


TASKS: dict[str, Task] = {
    "place": Task(classes=tuple(f"column {k + 1:02d}" for k in range(_N_PLACES)), place=_place),
    "orientation": Task(
        classes=tuple(f"{360 * k / _N_TURNS:05.1f} degrees" for k in range(_N_TURNS)), place=_orientation
    ),
    "count": Task(classes=tuple(str(k + 1) for k in range(_MOST)), place=_count),
    "distance": Task(classes=tuple(f"step {k + 1}" for k in range(_N_DISTANCES)), place=_distance),
}
