"""Drawn tasks: the class of an image is what its shapes say, and all else of it varies."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sidecache as sc
from adapt.config.pipeline import Config
from extract.config import DataConfig
from extract.sources import drawn
from extract.sources.drawn import KINDS, SIDE, TASKS, VERSION, Drawing, Shape, draw_image
from extract.sources.open_source import ImageSource, open_source
from store.errors import UserError

# Mean of the pixels of the first two training images of seed 0. If they change, raise VERSION: stores know it as part
# of the digest of every sample.
MEANS = {
    1: {"place": (191.57, 87.77), "orientation": (77.26, 190.53), "count": (98.21, 114.8), "distance": (131.33, 123.75)}
}


def open_task(task: str, **settings: object) -> ImageSource:
    return open_source(DataConfig(source=f"drawn:{task}", **settings))


def pixels(source: ImageSource, row: int, split: str = "train") -> np.ndarray:
    image = source.splits[split][row]
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_two_splits_with_as_many_images_of_every_class(task: str) -> None:
    source = open_task(task)
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 1000, "test": 500}
    for images in source.splits.values():
        counts = Counter(images.labels.tolist())
        assert set(counts) == set(range(len(source.classes)))
        assert max(counts.values()) - min(counts.values()) <= 1
    assert source.name == f"drawn-{task}"


@pytest.mark.parametrize("task", TASKS)
def test_images_depend_on_task_seed_split_and_row_alone(task: str) -> None:
    source, again, other = open_task(task), open_task(task), open_task(task, split_seed=1)
    assert np.array_equal(pixels(source, 5), pixels(again, 5))
    assert source.splits["train"].digest(5) == again.splits["train"].digest(5)
    others = [(source, 5 + len(source.classes), "train"), (source, 5, "test"), (other, 5, "train")]
    for where, row, split in others:
        assert where.splits[split].labels[row] == source.splits["train"].labels[5]
        assert not np.array_equal(pixels(where, row, split), pixels(source, 5))
        assert where.splits[split].digest(row) != source.splits["train"].digest(5)


def test_tasks_have_images_of_their_own() -> None:
    splits = [images for task in TASKS for images in open_task(task).splits.values()]
    digests = [images.digest(row) for images in splits for row in range(len(images))]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("task", TASKS)
def test_the_images_are_those_of_this_version(task: str) -> None:
    source = open_task(task)
    means = [float(pixels(source, row).mean()) for row in (0, 1)]
    assert means == pytest.approx(MEANS[VERSION][task], abs=0.05)


LABELS = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed))


@settings(deadline=None)
@given(st.integers(0, 15), LABELS)
def test_a_place_is_a_column(label: int, draw: np.random.Generator) -> None:
    (shape,) = TASKS["place"].place(label, draw)
    assert int(shape.x / (SIDE / 16)) == label


@settings(deadline=None)
@given(st.integers(0, 15), LABELS)
def test_an_orientation_is_a_sixteenth_of_the_circle(label: int, draw: np.random.Generator) -> None:
    (shape,) = TASKS["orientation"].place(label, draw)
    assert shape.kind == "arrow"
    assert round(shape.turn / (2 * np.pi / 16)) == label
    assert is_inside(shape)


@settings(deadline=None)
@given(st.integers(0, 7), LABELS)
def test_a_count_is_that_of_shapes_which_do_not_touch(label: int, draw: np.random.Generator) -> None:
    shapes = TASKS["count"].place(label, draw)
    assert len(shapes) == label + 1
    assert all(map(is_inside, shapes))
    gaps = [
        np.hypot(one.x - other.x, one.y - other.y) - one.radius - other.radius
        for k, one in enumerate(shapes)
        for other in shapes[:k]
    ]
    assert min(gaps, default=np.inf) > 4


@settings(deadline=None)
@given(st.integers(0, 5), LABELS)
def test_a_distance_is_a_step_of_22_pixels_from_36_on(label: int, draw: np.random.Generator) -> None:
    one, other = TASKS["distance"].place(label, draw)
    assert int((np.hypot(one.x - other.x, one.y - other.y) - 36) // 22) == label
    assert is_inside(one)
    assert is_inside(other)


def is_inside(shape: Shape) -> bool:
    return all(shape.radius + 4 <= value <= SIDE - shape.radius - 4 for value in (shape.x, shape.y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", [0.0, 1.0, 4.0])
def test_a_shape_is_drawn_around_its_center_with_its_radius(kind: str, turn: float) -> None:
    shape = Shape(kind=kind, x=90.0, y=140.0, radius=40.0, turn=turn)
    x, y = np.meshgrid(np.arange(SIDE) + 0.5 - shape.x, np.arange(SIDE) + 0.5 - shape.y)
    inside = KINDS[kind](*drawn._own_axes(shape)) < 0
    assert inside[np.hypot(x, y) > 1.3 * shape.radius].sum() == 0
    assert np.hypot(x, y)[inside].max() > 0.9 * shape.radius
    assert 0.15 < inside.sum() / (np.pi * shape.radius**2) <= 1.0
    if kind == "arrow":  # its head is where it points to
        ahead = x * np.cos(turn) + y * np.sin(turn)
        assert (inside & (ahead > 0)).sum() > 1.5 * (inside & (ahead < 0)).sum()
    else:
        assert np.hypot(x[inside].mean(), y[inside].mean()) < 1


@pytest.mark.parametrize("seed", range(8))
def test_shapes_differ_from_their_background(seed: int) -> None:
    """The same image without its shape differs there, and nowhere else."""
    shape = Shape(kind="disc", x=100.0, y=60.0, radius=20.0, turn=0.0)
    with_it, without = (
        draw_image(lambda *_, shapes=shapes: shapes, 0, np.random.default_rng(seed)).astype(float)
        for shapes in ([shape], [Shape(kind="disc", x=100.0, y=60.0, radius=1e-3, turn=0.0)])
    )
    changed = np.abs(with_it - without).mean(axis=2)
    x, y = np.meshgrid(np.arange(SIDE) + 0.5 - shape.x, np.arange(SIDE) + 0.5 - shape.y)
    assert changed[np.hypot(x, y) < 18].mean() > 25
    assert changed[np.hypot(x, y) > 22].max() == 0


@pytest.mark.parametrize("name", ["places", "Place", "x"])
def test_a_task_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="legal: drawn:place, drawn:orientation, drawn:count, drawn:distance"):
        open_task(name)


def test_a_job_runs_on_drawn_images(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "N_TRAIN", 48)
    monkeypatch.setattr(drawn, "N_TEST", 8)
    rows = sc.run(tiny_config("data={source: drawn:count}", "methods=[linear_probe]"))
    assert {row.dataset for row in rows} == {"drawn-count"}


def test_an_image_needs_no_other() -> None:
    image = Drawing("count", 3, seed=0, split="train", row=11).decode("train/0011")
    assert np.array_equal(np.asarray(image), pixels(open_task("count"), 11))
