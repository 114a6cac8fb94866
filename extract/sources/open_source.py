"""Where samples come from: `open_source` turns the `data:` section into a train and a test split."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from torch.utils.data import Dataset

from extract.config import DataConfig
from extract.sources.digits import list_digits
from extract.sources.folders import list_folder
from extract.sources.samples import Content, Listing, Picture, Sample
from extract.sources.similar_class_names import note_similar
from extract.sources.tables import list_csv, list_parquet
from extract.sources.tars import list_tars
from extract.sources.torchvision_sets import list_torchvision
from extract.sources.videos import expand_views, list_video_csv, list_video_folder, sampling_text
from store.errors import UserError
from store.growing.growth import Known

Labels = Int64[np.ndarray, "samples"] | UInt8[np.ndarray, "samples classes"]

LISTERS: dict[str, Callable[[DataConfig], Listing]] = {
    "digits": list_digits,
    "folder": list_folder,
    "csv": list_csv,
    "parquet": list_parquet,
    "tars": list_tars,
    "torchvision": list_torchvision,
    "video_folder": list_video_folder,
    "video_csv": list_video_csv,
}


@runtime_checkable
class ImageSplit(Protocol):
    """A map-style torch Dataset of upright RGB images or clips; several threads may call every method at once."""

    ids: Sequence[str]
    labels: Labels

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Picture: ...

    def digest(self, row: int) -> bytes: ...


@dataclass(frozen=True)
class ImageSource:
    """A train and a test split over the same classes.

    Attributes:
        views: rows that show the same sample, one after the other.
        sampling: how these are drawn from a video; empty for images.
        drawn: how the test split was, in words; empty where the source has one.
        is_decoded_here: whether samples are videos that `extract.video` decodes: its decoder goes into the provenance.
    """

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    splits: Mapping[str, ImageSplit]
    views: int = 1
    sampling: str = ""
    drawn: str = ""
    is_decoded_here: bool = False


class SampleSplit(Dataset[Picture]):
    """The ImageSplit of all sources: ids, labels and, row by row, the place of the image or clip."""

    def __init__(self, samples: Sequence[Sample], labels: Labels) -> None:
        self.ids: Sequence[str] = tuple(sample.id for sample in samples)
        self.labels = labels
        self._contents: tuple[Content, ...] = tuple(sample.content for sample in samples)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Picture:
        """Upright RGB; DecodeError if the sample is damaged."""
        return self._contents[row].decode(self.ids[row])

    def digest(self, row: int) -> bytes:
        """16 bytes of blake2b over the sample's encoded content."""
        return self._contents[row].digest(self.ids[row])


def open_source(config: DataConfig, known: Known | None = None) -> ImageSource:
    """The samples that `data:` names. Pixels are read later, one by one; a fault in the listing is a UserError.

    Args:
        known: what a store holds; where the test split is drawn, samples that it knows keep their side.
    """
    listing = LISTERS[config.source.partition(":")[0]](config)
    train, test, drawn = listing.train, listing.test, ""
    if test is None:
        drawn, sides = drawn_text(config), _known_sides(listing, known)
        chosen = draw_test(train, config.test_fraction, listing.multi_label, config.split_seed, sides)
        train, test = ([s for s in listing.train if (s.id in chosen) is side] for side in (False, True))
    if config.clips:
        train, test = (expand_views(samples, config.clips.views) for samples in (train, test))
    _check_samples(listing.name, train, test)
    classes = listing.classes or order_classes(_labels_of(train))
    _check_classes(listing.name, classes, train, test)
    note_similar(listing.name, classes)
    splits = {
        name: SampleSplit(samples, _number_labels(samples, classes, listing.multi_label))
        for name, samples in (("train", train), ("test", test))
    }
    views, sampling = (config.clips.views, sampling_text(config.clips)) if config.clips else (1, "")
    return ImageSource(listing.name, classes, listing.multi_label, splits, views, sampling, drawn, bool(config.clips))


def drawn_text(config: DataConfig) -> str:
    """All that decides how a test split is drawn, beside the samples."""
    return json.dumps({"test_fraction": config.test_fraction, "split_seed": config.split_seed})


def _known_sides(listing: Listing, known: Known | None) -> dict[str, str]:
    """Id -> split of the samples that a store of this data set holds."""
    if known is None or known.schema.dataset != listing.name:
        return {}
    held = {row: split for split, rows in known.ids.items() for row in rows}
    first_view = "#0" if known.schema.views > 1 else ""
    return {s.id: held[s.id + first_view] for s in listing.train if s.id + first_view in held}


def draw_test(
    samples: Sequence[Sample],
    fraction: float,
    multi_label: bool,
    seed: int = 0,
    sides: Mapping[str, str] | None = None,
) -> set[str]:
    """Ids of the samples that play the test set of a source without one.

    Each class gives the `fraction` of it that comes first in the order of the ids' hashes, salted with `seed`: neither
    the order of the samples nor another class matters, and one more sample moves at most one other. Multi-label samples
    are drawn from the whole in the same way, less those without which a class would have no training sample. Parts of
    one file stay on one side, as far as they are of one class.

    Args:
        sides: id -> `train` or `test` of samples that keep their side, as do parts of their files. Of the others each
            class gives what its fraction of all then lacks.
    """
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(() if multi_label else sample.labels, []).append(sample)
    chosen: set[str] = set()
    for group in groups.values():
        old_test, old_train, free = _on_sides(group, sides or {})
        ordered = sorted(free, key=lambda sample: (_hash(sample.file, seed), sample.id))
        wanted = min(int(len(group) * fraction + 0.5), len(group) - 1) - len(old_test)
        cuts = [0, *(k for k in range(1, len(free)) if ordered[k - 1].file != ordered[k].file)]
        if old_train:  # else one must be left for training
            cuts.append(len(free))
        drawn = ordered[: min(cuts, key=lambda k: (abs(k - wanted), -k))]
        chosen.update(sample.id for sample in (*old_test, *drawn))
        if multi_label:
            chosen -= _last_holders(drawn, [*old_train, *ordered[len(drawn) :]])
    return chosen


def _on_sides(group: Sequence[Sample], sides: Mapping[str, str]) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples of one class that stay in test, that stay in train, and that are free."""
    side_of_file = {sample.file: sides[sample.id] for sample in group if sample.id in sides}
    side = [sides.get(sample.id, side_of_file.get(sample.file)) for sample in group]
    test, train, free = (
        [sample for sample, own in zip(group, side, strict=True) if own == wanted] for wanted in ("test", "train", None)
    )
    return test, train, free


def _last_holders(drawn: Sequence[Sample], kept: Sequence[Sample]) -> set[str]:
    """Drawn samples that must go back, so that every class keeps one training sample."""
    missing = _labels_of(drawn) - _labels_of(kept)
    back: set[str] = set()
    for sample in reversed(drawn):
        if missing.intersection(sample.labels):
            missing.difference_update(sample.labels)
            back.add(sample.id)
    return back


def _labels_of(samples: Sequence[Sample]) -> set[str]:
    return {label for sample in samples for label in sample.labels}


def _hash(sample_id: str, seed: int) -> bytes:
    salt = seed.to_bytes(blake2b.SALT_SIZE, "little")  # all zeros is no salt
    return blake2b(sample_id.encode(errors="surrogateescape"), digest_size=16, salt=salt).digest()


def order_classes(names: Collection[str]) -> tuple[str, ...]:
    """Sorted, by number if all are integers: label k of a data set labeled 0..K-1 is index k."""
    if all(name.isdecimal() and str(int(name)) == name for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _number_labels(samples: Sequence[Sample], classes: Sequence[str], multi_label: bool) -> Labels:
    index = {name: k for k, name in enumerate(classes)}
    if not multi_label:
        return np.array([index[sample.labels[0]] for sample in samples], dtype=np.int64)
    labels = np.zeros((len(samples), len(classes)), dtype=np.uint8)
    for row, sample in enumerate(samples):
        labels[row, [index[name] for name in sample.labels]] = 1
    return labels


def _check_samples(name: str, train: Sequence[Sample], test: Sequence[Sample]) -> None:
    for split, samples in (("train", train), ("test", test)):
        if not samples:
            raise UserError(
                f"the {split} split of {name} is empty; add samples (or, if drawn by data.test_fraction, change that)"
            )
        seen: set[str] = set()
        for sample in samples:
            if sample.id in seen:
                raise UserError(f"the id {sample.id!r} occurs twice in the {split} split of {name}; rename one")
            seen.add(sample.id)
            if not _is_text(sample.id):
                raise UserError(f"the name {sample.id!r} in {name} is not valid UTF-8; rename the file")


def _is_text(name: str) -> bool:
    """False for a file name of other bytes than UTF-8, which the store could not keep."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_classes(name: str, classes: Sequence[str], train: Sequence[Sample], test: Sequence[Sample]) -> None:
    if len(classes) < 2:
        raise UserError(f"{name} has only one class, {classes[0]!r}; training a classifier wants at least two")
    unknown = sorted(_labels_of(test).difference(classes))
    if unknown:
        raise UserError(
            f"the test split of {name} has classes that train lacks: {', '.join(unknown[:5])}; "
            f"known are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}. "
            "Add training samples of them, or remove them from the test split"
        )
