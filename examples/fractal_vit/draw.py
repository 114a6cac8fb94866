"""Draws labeled images from formulas alone, without photographs or fonts.

A class is a random set of formula parameters; an image is one jittered instance of its class (formula-driven supervised
learning). Fractals follow Kataoka et al., "Pre-training without Natural Images", arXiv 2101.08515 (FractalDB), and
contours "Replacing Labeled Real-image Datasets with Auto-generated Contours" by the same authors, arXiv 2206.09132. Pen
strokes and wave textures are our own. Points are in [-1, 1]^2; ink is 0 (paper) to 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SIZE = 32


def uniform(low: float, high: float, shape: tuple[int, ...], g: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def normal(shape: tuple[int, ...], g: Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def rotation(angle: Tensor) -> Tensor:
    """Angles (...) -> rotation matrices (..., 2, 2)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)


def pixel_centers() -> Tensor:
    """(SIZE * SIZE, 2), rows first."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    return torch.cartesian_prod(axis, axis)


# ---- instances: the differences between two images of a class


def random_affine(n: int, g: Generator) -> Tensor:
    """(n, 2, 2): rotation within 15 degrees, scale, aspect and shear."""
    scale = uniform(0.6, 1.0, (n, 1), g) * torch.exp(uniform(-0.2, 0.2, (n, 2), g))
    shear = torch.eye(2).repeat(n, 1, 1)
    shear[:, 0, 1] = uniform(-0.2, 0.2, (n,), g)
    return rotation(uniform(-0.26, 0.26, (n,), g)) @ shear @ torch.diag_embed(scale)


def jitter(points: Tensor, g: Generator) -> Tensor:
    """Bend points (n, p, 2) by one smooth wave, then map them affinely and shift them."""
    n = len(points)
    phase = points @ uniform(-2.5, 2.5, (n, 2, 2), g) + uniform(0, math.tau, (n, 1, 2), g)
    bent = points + uniform(0, 0.1, (n, 1, 1), g) * phase.sin()
    return bent @ random_affine(n, g).mT + uniform(-0.15, 0.15, (n, 1, 2), g)


def centered(points: Tensor) -> Tensor:
    """Fit each image's points (n, p, 2) into the unit square; the outermost 2 % of points may be outside."""
    ordered = points.sort(1).values
    cut = points.shape[1] // 50
    low, high = ordered[:, cut], ordered[:, -1 - cut]
    half = ((high - low) / 2).amax(-1, keepdim=True).clamp(min=1e-3)
    return ((points - ((low + high) / 2)[:, None]) / half[:, None]).clamp(-3, 3)


def pen(points: Tensor, g: Generator) -> Tensor:
    """Ink (n, SIZE, SIZE) of a round pen that visits points (n, p, 2); its width and softness differ by image."""
    n = len(points)
    distance = torch.cdist(pixel_centers().expand(n, -1, -1), points).amin(-1)
    width, softness = uniform(0.04, 0.2, (n, 1), g), uniform(0.02, 0.06, (n, 1), g)
    return ((width - distance) / softness).sigmoid().view(n, SIZE, SIZE)


# ---- fractals: iterated function systems of four contractions


def fractal_classes(n: int, g: Generator) -> Tensor:
    """(n, 4, 2, 3) affine maps. Of three candidates a class, the one with most ink is kept, as in FractalDB."""
    shape = (3 * n, 4)
    stretch = torch.diag_embed(uniform(0.2, 0.85, (*shape, 2), g))
    linear = rotation(uniform(0, math.tau, shape, g)) @ stretch @ rotation(uniform(0, math.tau, shape, g))
    maps = torch.cat([linear, uniform(-1, 1, (*shape, 2, 1), g)], -1)
    ink = splat(centered(attractor(maps, g))).flatten(1).mean(1)
    return maps[ink.argsort(descending=True)[:n]]


def attractor(maps: Tensor, g: Generator, walkers: int = 160, steps: int = 24, kept: int = 14) -> Tensor:
    """Chaos game: points (n, kept * walkers, 2) on the attractors of maps (n, 4, 2, 3)."""
    n = len(maps)
    chance = torch.linalg.det(maps[..., :2]).abs() + 0.02
    choices = torch.multinomial(chance, steps * walkers, replacement=True, generator=g).view(n, steps, walkers)
    rows = torch.arange(n)[:, None]
    points, visited = torch.zeros(n, walkers, 2), []
    for step in range(steps):
        chosen = maps[rows, choices[:, step]]  # (n, walkers, 2, 3)
        points = (chosen[..., :2] * points[..., None, :]).sum(-1) + chosen[..., 2]
        visited.append(points)
    return torch.cat(visited[-kept:], 1)


def splat(points: Tensor) -> Tensor:
    """Ink (n, SIZE, SIZE) of points (n, p, 2), each one dot."""
    cell = ((points + 1) / 2 * SIZE).floor().long()
    inside = ((cell >= 0) & (cell < SIZE)).all(-1)
    index = cell.clamp(0, SIZE - 1)
    flat = torch.zeros(len(points), SIZE * SIZE)
    flat.scatter_add_(1, index[..., 0] * SIZE + index[..., 1], inside.float())
    return (flat / 3).clamp(max=1).view(-1, SIZE, SIZE)


def draw_fractals(maps: Tensor, g: Generator) -> Tensor:
    maps = maps * uniform(0.9, 1.1, tuple(maps.shape), g)
    return splat(jitter(centered(attractor(maps, g)), g))


# ---- closed contours: Fourier series in the complex plane


def contour_classes(n: int, g: Generator) -> Tensor:
    """(n, 8, 2) complex coefficients of frequencies -4..-1 and 1..4, smaller for higher ones."""
    frequency = torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4])
    return normal((n, 8, 2), g) / frequency.abs().pow(1.2)[:, None]


def draw_contours(coefficients: Tensor, g: Generator) -> Tensor:
    coefficients = coefficients + 0.06 * normal(tuple(coefficients.shape), g)
    angle = torch.arange(96) / 96 * math.tau
    turns = rotation(angle[:, None] * torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4]))  # (96, 8, 2, 2)
    points = torch.einsum("pkij,nkj->npi", turns, coefficients)
    return pen(jitter(centered(points), g), g)


# ---- pen strokes: one to three cubic Bezier curves


def stroke_classes(n: int, g: Generator) -> Tensor:
    """(n, 3, 4, 2) control points; a class of fewer than three strokes repeats its first."""
    control = uniform(-1, 1, (n, 3, 4, 2), g)
    count = torch.randint(1, 4, (n,), generator=g)
    absent = torch.arange(3) >= count[:, None]
    control[absent] = control[:, :1].expand_as(control)[absent]
    return control


def draw_strokes(control: Tensor, g: Generator) -> Tensor:
    control = control + 0.1 * normal((len(control), 1, 4, 2), g) + 0.05 * normal((len(control), 3, 1, 2), g)
    t = torch.linspace(0, 1, 32)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)  # (32, 4)
    points = torch.einsum("pk,nski->nspi", bernstein, control).flatten(1, 2)
    return pen(jitter(centered(points), g), g)


# ---- textures: sums of plane waves, hard or soft


def texture_classes(n: int, g: Generator) -> Tensor:
    """(n, 4, 2): three wave vectors in radians a unit, and a last row that holds the hardness of the edges."""
    angle, length = uniform(0, math.tau, (n, 3), g), uniform(3, 20, (n, 3), g)
    waves = torch.stack([angle.cos(), angle.sin()], -1) * length[..., None]
    return torch.cat([waves, uniform(1, 6, (n, 1, 1), g).expand(n, 1, 2)], 1)


def draw_textures(params: Tensor, g: Generator) -> Tensor:
    n = len(params)
    waves = params[:, :3] * uniform(0.93, 1.07, (n, 3, 1), g)
    phase = jitter(pixel_centers().expand(n, -1, -1), g) @ waves.mT + uniform(0, math.tau, (n, 1, 3), g)
    height = (phase.cos() * uniform(0.6, 1.4, (n, 1, 3), g)).sum(-1)
    return (params[:, 3, :1] * height).sigmoid().view(n, SIZE, SIZE)


FAMILIES: dict[str, tuple[Callable[[int, Generator], Tensor], Callable[[Tensor, Generator], Tensor]]] = {
    "fractals": (fractal_classes, draw_fractals),
    "contours": (contour_classes, draw_contours),
    "strokes": (stroke_classes, draw_strokes),
    "textures": (texture_classes, draw_textures),
}


# ---- from ink to an image


def lose_detail(ink: Tensor, g: Generator) -> Tensor:
    """Shrink the whole batch (n, 1, SIZE, SIZE) to 8 to SIZE pixels and enlarge it again: a coarse scan."""
    small = int(torch.randint(8, SIZE + 1, (1,), generator=g))
    coarse = F.interpolate(ink, size=(small, small), mode="area")
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)


def color(ink: Tensor, g: Generator) -> Tensor:
    """Ink (n, 1, SIZE, SIZE) on paper, light on dark: (n, 3, SIZE, SIZE). Half of the images are gray."""
    n = len(ink)
    gray = torch.rand(n, 1, 1, 1, generator=g) < 0.5
    tint = 0.2 * normal((2, n, 3, 1, 1), g) * ~gray
    dark, light = uniform(0, 0.25, (n, 1, 1, 1), g) + tint[0], uniform(0.6, 1, (n, 1, 1, 1), g) + tint[1]
    return dark + (light - dark) * ink


def grain(images: Tensor, g: Generator) -> Tensor:
    return images + uniform(0, 0.05, (len(images), 1, 1, 1), g) * normal(tuple(images.shape), g)


@dataclass(frozen=True)
class Album:
    """The classes of one seed. Labels number the classes of the families in their order."""

    params: dict[str, Tensor]

    @classmethod
    def of(cls, families: list[str], classes_a_family: int, g: Generator) -> "Album":
        return cls({name: FAMILIES[name][0](classes_a_family, g) for name in families})

    @property
    def num_classes(self) -> int:
        return sum(len(p) for p in self.params.values())

    def batch(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        """Images (n, 3, SIZE, SIZE) in about [0, 1] and labels (n,); all families have equally many."""
        inks, labels, first = [], [], 0
        for name, params in self.params.items():
            chosen = torch.randint(len(params), (n // len(self.params),), generator=g)
            inks.append(lose_detail(FAMILIES[name][1](params[chosen], g)[:, None], g))
            labels.append(chosen + first)
            first += len(params)
        return grain(color(torch.cat(inks), g), g), torch.cat(labels)
