"""Images in folders: `root/<split>/<class>/**/image`, or `root/<class>/**/image` without splits."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from extract.config import DataConfig
from extract.images import ENDINGS
from extract.samples import TRAIN, FileSlice, Listing, Sample, choose_test, root_folder
from store.errors import UserError

LAYOUT = "it wants <root>/train/<class>/<images> and <root>/test/<class>/<images>, or <root>/<class>/<images>"

_LIKE_A_SPLIT = re.compile(r"(train|test|val|eval|dev)", re.IGNORECASE)


def list_folder(config: DataConfig) -> Listing:
    root = root_folder(config)
    folders = _folder_names(root)
    if not folders:
        raise UserError(f"data.root {root} holds no class folders; {LAYOUT}")
    splits = folders if _are_splits(root, folders) else []
    test = choose_test(splits, config)
    train_folder = root / TRAIN if splits else root
    return Listing(
        name=root.resolve().name,
        train=_list_classes(root, train_folder),
        test=None if test is None else _list_classes(root, root / test),
        classes=tuple(_folder_names(train_folder)),  # sorted as text, as torchvision's ImageFolder does
    )


def has_image_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS  # noqa: PTH122 (called for every file of the source)


def _are_splits(root: Path, folders: Sequence[str]) -> bool:
    """Whether the top folders are splits and not classes, which may be called `train` too and may have subfolders."""
    divided = [name for name in folders if _folder_names(root / name) and not _holds_images(root / name)]
    # Without a train these are splits all the same, to be reported by choose_test and not taken for classes.
    return TRAIN in divided or (divided == list(folders) and all(_LIKE_A_SPLIT.match(name) for name in folders))


def _list_classes(root: Path, folder: Path) -> list[Sample]:
    classes = _folder_names(folder)
    if not classes:
        raise UserError(f"{folder} holds no class folders; {LAYOUT}")
    samples = [sample for name in classes for sample in _list_class(root, folder / name)]
    return sorted(samples, key=lambda sample: sample.id)


def _list_class(root: Path, folder: Path) -> list[Sample]:
    samples = [
        Sample(Path(path).relative_to(root).as_posix(), (folder.name,), FileSlice(path))
        for path in _walk_images(str(folder), ())
    ]
    if not samples:
        raise UserError(
            f"the class folder {folder} holds no images; fill it or remove it (endings: {' '.join(sorted(ENDINGS))})"
        )
    return samples


def _walk_images(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of all images below; links are followed, as data sets are often built of them."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} links back to a folder above itself; remove the link")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk_images(entry.path, (*above, real))
        elif has_image_ending(entry.name):
            if not entry.is_file():
                raise UserError(f"{entry.path} is a broken link or no regular file; restore or remove it")
            yield entry.path


def _folder_names(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(str(folder)) if entry.is_dir()]


def _holds_images(folder: Path) -> bool:
    return any(has_image_ending(entry.name) and entry.is_file() for entry in _entries(str(folder)))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """All but the hidden, in an order that depends neither on the file system nor on the locale."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError as error:
        raise UserError(f"the folder {folder} may not be read ({error.strerror}); change its permissions") from error
