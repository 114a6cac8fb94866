"""The classification data sets of torchvision, by class name; nothing is downloaded here.

torchvision has no common interface for splits: the class's parameters tell them.
"""

import difflib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from extract.config import DataConfig
from extract.images.decode import DecodeError, decode_rgb, to_rgb, undecodable
from extract.sources.samples import TEST_NAMES, TRAIN, Listing, Sample, choose_test, content_digest, root_folder
from extract.sources.torchvision_targets import Targets, class_names, read_targets
from store.errors import UserError

_SPLIT_KEYWORDS = ("train", "split", "image_set", "classes")
_TRAIN_NAMES = (TRAIN, "trainval", "train-standard")
# EMNIST calls its six variants splits; this is the one with as many samples of every class.
_FIXED: dict[str, dict[str, Any]] = {"EMNIST": {"split": "balanced"}}


_fake_data_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class DatasetItem:
    """One image of a torchvision data set, which hides the encoded bytes: the digest is over the pixels."""

    dataset: Any
    row: int

    def decode(self, sample_id: str) -> Image.Image:
        try:
            if isinstance(self.dataset, datasets.FakeData):
                with _fake_data_lock:  # it seeds torch's generator for each image and sets it back
                    image = self.dataset[self.row][0]
            else:
                image = self.dataset[self.row][0]
        except (DecodeError, MemoryError):
            raise
        except Exception as error:  # the data set's loader may raise whatever Pillow does
            raise undecodable(sample_id, error) from error
        return to_rgb(image, sample_id)

    def digest(self, sample_id: str) -> bytes:
        image = self.decode(sample_id)
        return content_digest(f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes())


@dataclass(frozen=True)
class _Kind:
    """A class of torchvision.datasets and the parameters it takes."""

    name: str
    build: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    @property
    def keyword(self) -> str | None:
        """The parameter that picks the split."""
        legal = [name for name in _SPLIT_KEYWORDS if name in self.parameters and name not in _FIXED.get(self.name, {})]
        return legal[0] if legal else None


def list_torchvision(config: DataConfig) -> Listing:
    kind = _find(config.source.partition(":")[2])
    fixed = _fixed_arguments(kind, config)
    train, test = _build_splits(kind, config, fixed)
    targets = read_targets(kind.name, train)
    names = class_names(train, targets)
    prefix = kind.name.lower()
    return Listing(
        name=prefix,
        train=_samples(prefix if test is None else f"{prefix}/train", train, targets, names),
        test=None if test is None else _samples(f"{prefix}/test", test, read_targets(kind.name, test), names),
        classes=names,
        multi_label=targets.ndim == 2,
    )


def _find(name: str) -> _Kind:
    kinds = {
        known.lower(): getattr(datasets, known)
        for known in datasets.__all__
        if inspect.isclass(getattr(datasets, known)) and known != "VisionDataset"
    }
    if name.lower() not in kinds:
        near = difflib.get_close_matches(name.lower(), kinds, cutoff=0.5)
        hint = f"did you mean {' or '.join(kinds[n].__name__ for n in near)}? " if near else ""
        raise UserError(f"torchvision has no data set {name!r}; {hint}Legal are the classes of torchvision.datasets")
    found = kinds[name.lower()]
    return _Kind(found.__name__, found, _parameters(found))


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """Those of the constructor and, as long as it passes **kwargs on, of the classes above."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            found = {**own, **found}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return {k: p for k, p in found.items() if k != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _fixed_arguments(kind: _Kind, config: DataConfig) -> dict[str, Any]:
    """The arguments that are the same for every split."""
    offered = {"download": False, "loader": _load, **_FIXED.get(kind.name, {})}
    arguments = {name: value for name, value in offered.items() if name in kind.parameters}
    if "root" in kind.parameters:
        if config.root is not None and not config.root.exists():
            raise UserError(f"data.root {config.root} does not exist; create it, then {_remedy(kind, config.root, '')}")
        arguments["root"] = str(root_folder(config))
    lacking = [
        name
        for name, parameter in kind.parameters.items()
        if parameter.default is parameter.empty and name not in arguments and name != kind.keyword
    ]
    if lacking:
        raise UserError(
            f"torchvision.datasets.{kind.name} wants {', '.join(lacking)}, which data: cannot give; "
            "use source folder, csv or tars for its images"
        )
    return arguments


def _load(path: str | Path) -> Image.Image:
    """In place of torchvision's loader, which leaves EXIF orientation out and clips 16-bit images."""
    return decode_rgb(Path(path).read_bytes(), str(path))


def _build_splits(kind: _Kind, config: DataConfig, fixed: dict[str, Any]) -> tuple[Any, Any]:
    """The data sets of train and test; test is None where it must be drawn from train."""
    if kind.keyword is None:
        choose_test((), config)
        return _build(kind, fixed), None
    train = _first_legal(kind, fixed, _TRAIN_NAMES)
    if train is None:
        raise UserError(
            f"torchvision.datasets.{kind.name} has no split {' or '.join(_TRAIN_NAMES)}; use another source"
        )
    if config.test_split is None:
        return train, _first_legal(kind, fixed, TEST_NAMES)
    test = None if config.test_split in _TRAIN_NAMES else _first_legal(kind, fixed, (config.test_split,))
    if test is None:
        raise UserError(
            f"data.test_split is {config.test_split!r}, which is no test split of torchvision.datasets.{kind.name}; "
            f"name another value of its argument {kind.keyword!r} (train: true and false are called train and test)"
        )
    return train, test


def _first_legal(kind: _Kind, fixed: dict[str, Any], splits: Sequence[str]) -> Any:
    """The data set of the first of the splits that the class knows, or None."""
    assert kind.keyword is not None
    for split in splits:
        if kind.keyword != "train":
            dataset = _build(kind, {**fixed, kind.keyword: split})
        else:
            dataset = _build(kind, {**fixed, "train": split == TRAIN}) if split in (TRAIN, "test") else None
        if dataset is not None:
            return dataset
    return None


def _build(kind: _Kind, arguments: dict[str, Any]) -> Any:
    """The data set, or None if torchvision does not know the split."""
    try:
        return kind.build(**arguments)
    except Exception as error:  # each class has its own way to say that files are missing
        if isinstance(error, ValueError) and "Unknown value" in str(error):
            return None
        root, split = arguments.get("root"), arguments.get(kind.keyword or "")
        given = "" if split is None else f", {kind.keyword}={split!r}"
        raise UserError(
            f"torchvision.datasets.{kind.name} cannot be read from {root}: {error}. "
            f"If it is not there yet, {_remedy(kind, root, given)}"
        ) from error


def _remedy(kind: _Kind, root: Any, given: str) -> str:
    if "download" not in kind.parameters:
        return "put its files there as torchvision's documentation of the class says"
    name = f"torchvision.datasets.{kind.name}"
    return f'download it with: python -c "import torchvision; {name}(root={str(root)!r}{given}, download=True)"'


def _samples(prefix: str, dataset: Any, targets: Targets, names: tuple[str, ...] | None) -> list[Sample]:
    def text(label: int) -> str:
        return names[label] if names is not None and label < len(names) else str(label)

    columns = targets.ndim == 2
    return [
        Sample(
            f"{prefix}/{row:07d}",
            tuple(text(int(label)) for label in (np.flatnonzero(target) if columns else (target,))),
            DatasetItem(dataset, row),
        )
        for row, target in enumerate(targets)
    ]
