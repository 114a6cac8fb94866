"""Lists the classification data sets of torchvision by class name; nothing is downloaded here.

torchvision has no common interface for splits, so the parameters of the class's constructor are inspected.
"""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from extract.config import DataConfig
from extract.images.decode import DecodeError, decode_rgb, to_rgb, undecodable
from extract.sources.data_root import root_folder
from extract.sources.samples import Sample, SourceSamples, content_digest
from extract.sources.splits import TRAIN, choose_splits, default_test_names
from extract.sources.torchvision_targets import Targets, class_names, read_targets
from store.errors import UserError, did_you_mean

_SPLIT_KEYWORDS = ("train", "split", "image_set", "classes")
_TRAIN_NAMES = (TRAIN, "trainval", "train-standard")
# EMNIST calls its six variants splits; this one has equally many samples of every class.
_FIXED: dict[str, dict[str, Any]] = {"EMNIST": {"split": "balanced"}}


_fake_data_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class DatasetItem:
    """One image of a torchvision data set. The encoded bytes are not accessible, so the digest is over the pixels."""

    dataset: Any
    row: int

    def decode(self, sample_id: str) -> Image.Image:
        """Upright RGB; raises DecodeError if the data set cannot load the image."""
        try:
            if isinstance(self.dataset, datasets.FakeData):
                with _fake_data_lock:  # it seeds torch's global generator for each image and restores it
                    image = self.dataset[self.row][0]
            else:
                image = self.dataset[self.row][0]
        except (DecodeError, MemoryError):
            raise
        except Exception as error:  # the data set's loader may raise any error of Pillow
            raise undecodable(sample_id, error) from error
        return to_rgb(image, sample_id)

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the pixels."""
        image = self.decode(sample_id)
        return content_digest(f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes())


@dataclass(frozen=True)
class _DatasetClass:
    """A class of torchvision.datasets and the parameters of its constructor."""

    name: str
    constructor: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    @property
    def full_name(self) -> str:
        return f"torchvision.datasets.{self.name}"

    @property
    def split_keyword(self) -> str | None:
        """The parameter that selects the split."""
        found = [name for name in _SPLIT_KEYWORDS if name in self.parameters and name not in _FIXED.get(self.name, {})]
        return found[0] if found else None

    def build(self, arguments: dict[str, Any]) -> Any:
        """The data set, or None if torchvision does not know the split."""
        try:
            return self.constructor(**arguments)
        except Exception as error:  # each class reports missing files in its own way
            if isinstance(error, ValueError) and "Unknown value" in str(error):
                return None
            root, split = arguments.get("root"), arguments.get(self.split_keyword or "")
            split_argument = "" if split is None else f", {self.split_keyword}={split!r}"
            raise UserError(
                f"{self.full_name} cannot be read from {root}: {error}. "
                f"If it is not there yet, {self.download_hint(root, split_argument)}"
            ) from error

    def build_first(self, fixed: dict[str, Any], splits: Sequence[str]) -> Any:
        """The data set of the first of the splits that the class knows, or None."""
        assert self.split_keyword is not None
        for split in splits:
            if self.split_keyword != "train":
                dataset = self.build({**fixed, self.split_keyword: split})
            elif split in (TRAIN, "test"):
                dataset = self.build({**fixed, "train": split == TRAIN})
            else:
                dataset = None
            if dataset is not None:
                return dataset
        return None

    def download_hint(self, root: Any, split_argument: str = "") -> str:
        """What a user has to do to get the files."""
        if "download" not in self.parameters:
            return "put its files there as torchvision's documentation of the class describes"
        call = f"{self.full_name}(root={str(root)!r}{split_argument}, download=True)"
        return f'download it with: python -c "import torchvision; {call}"'


def list_torchvision(config: DataConfig) -> SourceSamples:
    """All samples of the data set in `data.source`, such as torchvision:CIFAR10."""
    dataset_class = _find(config.source.partition(":")[2])
    fixed = _fixed_arguments(dataset_class, config)
    built = _build_splits(dataset_class, config, fixed)
    targets = read_targets(dataset_class.name, built.train)
    names = class_names(built.train, targets)
    prefix = dataset_class.name.lower()

    def list_split(split: str, dataset: Any) -> list[Sample]:
        return _samples(f"{prefix}/{split}", dataset, read_targets(dataset_class.name, dataset), names)

    return SourceSamples(
        name=prefix,
        train=_samples(prefix if built.test is None else f"{prefix}/train", built.train, targets, names),
        test=None if built.test is None else list_split("test", built.test),
        validation=() if built.validation is None else list_split("val", built.validation),
        classes=names,
        multi_label=targets.ndim == 2,
    )


def _find(name: str) -> _DatasetClass:
    classes = {
        known.lower(): getattr(datasets, known)
        for known in datasets.__all__
        if inspect.isclass(getattr(datasets, known)) and known != "VisionDataset"
    }
    if name.lower() not in classes:
        hint = did_you_mean(name, (known.__name__ for known in classes.values()))
        raise UserError(f"torchvision has no data set {name!r}; legal: the classes of torchvision.datasets{hint}")
    found = classes[name.lower()]
    return _DatasetClass(found.__name__, found, _parameters(found))


def _parameters(dataset_class: type) -> Mapping[str, inspect.Parameter]:
    """Parameters of the constructor and, while it passes **kwargs on, of the parent classes' constructors."""
    found: dict[str, inspect.Parameter] = {}
    for base in dataset_class.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            found = {**own, **found}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return {k: p for k, p in found.items() if k != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _fixed_arguments(dataset_class: _DatasetClass, config: DataConfig) -> dict[str, Any]:
    """The arguments that are the same for every split."""
    possible = {"download": False, "loader": _load, **_FIXED.get(dataset_class.name, {})}
    arguments = {name: value for name, value in possible.items() if name in dataset_class.parameters}
    if "root" in dataset_class.parameters:
        if config.root is not None and not config.root.exists():
            raise UserError(
                f"data.root {config.root} does not exist; create it, then {dataset_class.download_hint(config.root)}"
            )
        arguments["root"] = str(root_folder(config))
    missing = [
        name
        for name, parameter in dataset_class.parameters.items()
        if parameter.default is parameter.empty and name not in arguments and name != dataset_class.split_keyword
    ]
    if missing:
        raise UserError(
            f"{dataset_class.full_name} requires {', '.join(missing)}, which data: has no keys for; "
            "use source folder, csv or tars for its images"
        )
    return arguments


def _load(path: str | Path) -> Image.Image:
    """Replaces torchvision's loader, which ignores the EXIF orientation and clips 16-bit images."""
    return decode_rgb(Path(path).read_bytes(), str(path))


class _BuiltSplits(NamedTuple):
    """The data sets of the splits; None for a test or validation split that must be drawn from train."""

    train: Any
    test: Any = None
    validation: Any = None


def _build_splits(dataset_class: _DatasetClass, config: DataConfig, fixed: dict[str, Any]) -> _BuiltSplits:
    if dataset_class.split_keyword is None:
        choose_splits((), config)
        return _BuiltSplits(dataset_class.build(fixed))
    train = dataset_class.build_first(fixed, _TRAIN_NAMES)
    if train is None:
        raise UserError(f"{dataset_class.full_name} has no split {' or '.join(_TRAIN_NAMES)}; use another source")
    validation, test = None, None
    if config.val_split is not None:
        validation = _build_named(dataset_class, fixed, "val_split", config.val_split)
    if config.test_split is not None:
        test = _build_named(dataset_class, fixed, "test_split", config.test_split)
    else:
        test = dataset_class.build_first(fixed, default_test_names(config))
    return _BuiltSplits(train, test, validation)


def _build_named(dataset_class: _DatasetClass, fixed: dict[str, Any], key: str, split: str) -> Any:
    """The data set of the split that a key of the configuration names."""
    dataset = None if split in _TRAIN_NAMES else dataset_class.build_first(fixed, (split,))
    if dataset is None:
        kind = "validation" if key == "val_split" else "test"
        raise UserError(
            f"data.{key} is {split!r}, which is not a {kind} split of {dataset_class.full_name}; name "
            f"another value of its argument {dataset_class.split_keyword!r} (train: true and false are called train "
            "and test)"
        )
    return dataset


def _samples(prefix: str, dataset: Any, targets: Targets, names: tuple[str, ...] | None) -> list[Sample]:
    def class_name(label: int) -> str:
        return names[label] if names is not None and label < len(names) else str(label)

    samples = []
    for row, target in enumerate(targets):
        labels = np.flatnonzero(target) if targets.ndim == 2 else (target,)
        names_of_sample = tuple(class_name(int(label)) for label in labels)
        samples.append(Sample(f"{prefix}/{row:07d}", names_of_sample, DatasetItem(dataset, row)))
    return samples
