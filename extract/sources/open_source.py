"""Opens a source: turns the `data:` section of pipeline.yaml into a train and a test split over the same classes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from torch.utils.data import Dataset

from extract.config import DataConfig
from extract.sources.digits import list_digits
from extract.sources.drawn import list_drawn
from extract.sources.folders import list_folder
from extract.sources.samples import DecodedSample, Sample, SampleContent, SourceSamples
from extract.sources.similar_class_names import warn_of_similar_names
from extract.sources.splits import draw_settings, draw_test, labels_of
from extract.sources.tables import list_csv, list_parquet
from extract.sources.tars import list_tars
from extract.sources.torchvision_datasets import list_torchvision
from extract.sources.videos import expand_views, list_video_csv, list_video_folder, sampling_text
from store.errors import UserError
from store.growing.growth import Known

Labels = Int64[np.ndarray, "samples"] | UInt8[np.ndarray, "samples classes"]

LISTERS: dict[str, Callable[[DataConfig], SourceSamples]] = {
    "digits": list_digits,
    "drawn": list_drawn,
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
    """A map-style torch Dataset of upright RGB images or clips; several threads may call every method at once.

    Attributes:
        validation: of the training split, whether each row is of the source's own validation split; None if it has
            none there.
    """

    ids: Sequence[str]
    labels: Labels
    validation: Bool[np.ndarray, "samples"] | None

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...

    def digest(self, row: int) -> bytes:
        """16 bytes that identify the sample's content."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A train and a test split over the same classes.

    Attributes:
        name: of the data set, for the store and the report.
        classes: class names in order of their index.
        multi_label: whether a sample may have several labels.
        splits: `train` and `test`; `train` holds the samples of the source's own validation split too. If the store
            is to keep augmented views of the samples of `train`, these are the split `augmented`.
        views: number of consecutive rows that show the same sample.
        sampling: settings that determine which frames of a video are taken, as JSON; empty for images.
        drawn: settings that determine how the test split was drawn, as JSON; empty if the source has its own.
        augmentation: settings that determine the augmented views, as JSON; empty if there are none.
        val_split: the source's split that the validation samples come from; empty if validation is drawn.
        is_decoded_here: whether the samples are videos that `extract.video` decodes. If so, the decoder is part of the
            provenance.
    """

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    splits: Mapping[str, ImageSplit]
    views: int = 1
    sampling: str = ""
    drawn: str = ""
    augmentation: str = ""
    val_split: str = ""
    is_decoded_here: bool = False

    def __post_init__(self) -> None:
        if (self.splits["train"].validation is not None) != bool(self.val_split):
            raise ValueError("val_split names the split of the validation samples, which `train` must mark")

    def without(self, splits: Collection[str]) -> "ImageSource":
        """The source without some of its splits; `train` stays."""
        return replace(self, splits={name: split for name, split in self.splits.items() if name not in splits})


class SampleSplit(Dataset[DecodedSample]):
    """An ImageSplit made of listed samples; every image or clip is decoded when its row is read."""

    def __init__(
        self, samples: Sequence[Sample], labels: Labels, validation: Bool[np.ndarray, "samples"] | None = None
    ) -> None:
        self.ids: Sequence[str] = tuple(sample.id for sample in samples)
        self.labels, self.validation = labels, validation
        self._contents: tuple[SampleContent, ...] = tuple(sample.content for sample in samples)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> DecodedSample:
        """Upright RGB; raises DecodeError if the sample is damaged."""
        return self._contents[row].decode(self.ids[row])

    def digest(self, row: int) -> bytes:
        """16 bytes of blake2b over the sample's encoded content."""
        return self._contents[row].digest(self.ids[row])


def open_source(config: DataConfig, known: Known | None = None) -> ImageSource:
    """List the samples that `data:` names. Pixels are decoded later, sample by sample.

    Args:
        config: the `data:` section.
        known: the samples of an existing store; if the test split is drawn, they keep their split.

    Raises:
        UserError: the data are missing, or their listing is faulty.
    """
    listed = LISTERS[config.source.partition(":")[0]](config)
    # one row for each view of a video
    views = config.clips.views if config.clips else 1
    parts = _divide(listed, config, known).expanded(views)
    # number the classes
    _check_samples(listed.name, parts)
    classes = listed.classes or order_classes(labels_of(parts.train))
    _check_classes(listed.name, classes, parts)
    warn_of_similar_names(listed.name, classes)
    return ImageSource(
        name=listed.name,
        classes=classes,
        multi_label=listed.multi_label,
        splits=_number_splits(parts, classes, listed.multi_label),
        views=views,
        sampling=sampling_text(config.clips) if config.clips else "",
        drawn=draw_settings(config) if listed.test is None else "",
        val_split=config.val_split or "",
        is_decoded_here=config.clips is not None,
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The samples to train on, to validate on (empty if they are drawn later) and to test on."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]

    def expanded(self, views: int) -> "_Parts":
        """The same parts, with one sample for each view of a video."""
        return _Parts(
            train=expand_views(self.train, views),
            validation=expand_views(self.validation, views),
            test=expand_views(self.test, views),
        )


def _divide(listed: SourceSamples, config: DataConfig, known: Known | None) -> _Parts:
    """The parts of a source; a test split that it lacks is drawn from its training samples."""
    train, test = listed.train, listed.test
    if test is None:
        train, test = _draw_splits(listed, config, known)
    return _Parts(train=train, validation=listed.validation, test=test)


def _number_splits(parts: _Parts, classes: Sequence[str], multi_label: bool) -> dict[str, ImageSplit]:
    """The splits with class indices; validation samples follow the others of `train`."""
    train = [*parts.train, *parts.validation]
    is_validation = np.arange(len(train)) >= len(parts.train) if parts.validation else None
    return {
        "train": SampleSplit(train, _number_labels(train, classes, multi_label), is_validation),
        "test": SampleSplit(parts.test, _number_labels(parts.test, classes, multi_label)),
    }


def _draw_splits(
    listed: SourceSamples, config: DataConfig, known: Known | None
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Divide the training samples of a source without a test split into train and test."""
    test_ids = draw_test(
        listed.train,
        config.test_fraction,
        multi_label=listed.multi_label,
        seed=config.split_seed,
        stored_splits=_stored_splits(listed, known),
    )
    train = [sample for sample in listed.train if sample.id not in test_ids]
    test = [sample for sample in listed.train if sample.id in test_ids]
    return train, test


def _stored_splits(listed: SourceSamples, known: Known | None) -> dict[str, str]:
    """Id -> split of the samples that a store of this data set holds."""
    if known is None or known.schema.dataset != listed.name:
        return {}
    stored = {sample_id: split for split in ("train", "test") for sample_id in known.ids.get(split, ())}
    first_view = "#0" if known.schema.views > 1 else ""
    return {s.id: stored[s.id + first_view] for s in listed.train if s.id + first_view in stored}


def order_classes(names: Collection[str]) -> tuple[str, ...]:
    """Sort class names; by number if all are integers, so that label k of a data set labeled 0..K-1 has index k."""
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


def _check_samples(name: str, parts: _Parts) -> None:
    for split, samples, others in (("train", parts.train, parts.validation), ("test", parts.test, ())):
        if not samples:
            raise UserError(
                f"the {split} split of {name} is empty; add samples, or change data.test_fraction if it is drawn"
            )
        seen: set[str] = set()
        for sample in (*samples, *others):
            if sample.id in seen:
                where = f"the {split} and validation splits" if others else f"the {split} split"
                raise UserError(f"the id {sample.id!r} occurs twice in {where} of {name}; rename one")
            seen.add(sample.id)
            if not _is_utf8(sample.id):
                raise UserError(f"the name {sample.id!r} in {name} is not valid UTF-8; rename the file")


def _is_utf8(name: str) -> bool:
    """Whether a file name can be stored: on Linux, names may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_classes(name: str, classes: Sequence[str], parts: _Parts) -> None:
    if len(classes) < 2:
        raise UserError(f"{name} has only one class, {classes[0]!r}; a classifier requires at least two")
    for split, samples in (("test", parts.test), ("validation", parts.validation)):
        if unknown := sorted(labels_of(samples).difference(classes)):
            raise UserError(
                f"the {split} split of {name} has classes that train lacks: {', '.join(unknown[:5])}; "
                f"known are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}. "
                f"Add training samples of these classes, or remove them from the {split} split"
            )
