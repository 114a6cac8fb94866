"""Samples of equal content are named before the extraction: in train and in test, or with different labels."""

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import sidecache as sc
from adapt.config.pipeline import Config
from extract.job.repeated_samples import note_repeated_samples
from store.errors import Note
from store.listing import Listing


def listing(contents: Sequence[int], labels: Sequence[object], split: str) -> Listing:
    """A listing of samples of these contents."""
    digests = np.stack([np.full(16, content, np.uint8) for content in contents])
    return Listing(tuple(f"{split}/{row}.jpg" for row in range(len(contents))), np.array(labels), digests)


def notes(train: Listing, test: Listing, views: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note_repeated_samples({"train": train, "test": test, "augmented": train}, views)
    assert all(issubclass(warning.category, Note) for warning in caught)
    return [str(warning.message) for warning in caught]


def test_different_samples_are_not_noted() -> None:
    assert notes(listing([1, 2], [0, 1], "train"), listing([3], [0], "test")) == []


def test_the_same_sample_twice_in_a_split_with_one_label_is_not_noted() -> None:
    assert notes(listing([1, 1], [0, 0], "train"), listing([3], [0], "test")) == []


def test_samples_of_test_that_are_in_train_are_named() -> None:
    (note,) = notes(listing([1, 2, 5], [0, 1, 1], "train"), listing([3, 2, 5], [0, 1, 1], "test"))
    assert note.startswith("2 samples of test are in train too, such as 'test/1.jpg', which is 'train/1.jpg':")


@pytest.mark.parametrize("labels", [[0, 1, 1], [[0, 1], [1, 1], [1, 0]]])
def test_a_sample_with_two_labels_is_named(labels: list[object]) -> None:
    (note,) = notes(listing([1, 1, 2], labels, "train"), listing([3], labels[:1], "test"))
    assert note == "1 sample is listed again with another label, such as 'train/1.jpg', which is 'train/0.jpg'"


def test_views_of_one_video_are_no_repetition() -> None:
    train = listing([1, 1, 2, 2], [0, 0, 1, 1], "train")
    assert notes(train, listing([3, 3], [0, 0], "test"), views=2) == []
    of_views = Listing(
        ("a.mp4#0", "a.mp4#1"), *(getattr(listing([2, 2], [1, 1], ""), n) for n in ("labels", "digests"))
    )
    (note,) = notes(train, of_views, views=2)
    assert note.startswith("1 sample of test is in train too, such as 'a.mp4', which is 'train/2.jpg'")


def test_they_are_named_before_the_extraction(tiny_config: Callable[..., Config], image_folder: Path) -> None:
    leaked, other, *_ = sorted((image_folder / "train" / "green").iterdir())
    shutil.copy(leaked, image_folder / "test" / "green" / "leaked.png")
    shutil.copy(other, image_folder / "train" / "red" / "relabeled.png")
    config = tiny_config("backbone.weights=random")
    with (
        pytest.warns(Note, match=r"1 sample of test is in train too, such as 'test/green/leaked\.png'"),
        pytest.warns(Note, match=r"1 sample is listed again with another label, such as 'train/red/relabeled\.png'"),
    ):
        sc.extract(config)
