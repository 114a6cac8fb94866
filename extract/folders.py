"""Files in folders: `root/<split>/<class>/**/file`, or `root/<class>/**/file` without splits."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from extract.config import DataConfig
from extract.samples import IMAGES, TRAIN, Listing, Medium, Sample, choose_test, root_folder
from store.errors import UserError

_LIKE_A_SPLIT = re.compile(r"(train|test|val|eval|dev)", re.IGNORECASE)


def list_folder(config: DataConfig, medium: Medium = IMAGES) -> Listing:
    root = root_folder(config)
    folders = _folder_names(root)
    if not folders:
        raise UserError(f"data.root {root} holds no class folders; {_layout(medium)}")
    splits = folders if _are_splits(root, folders, medium) else []
    test = choose_test(splits, config)
    train_folder = root / TRAIN if splits else root
    return Listing(
        name=root.resolve().name,
        train=_list_classes(root, train_folder, medium),
        test=None if test is None else _list_classes(root, root / test, medium),
        classes=tuple(_folder_names(train_folder)),  # sorted as text, as torchvision's ImageFolder does
    )


def _layout(medium: Medium) -> str:
    classes = f"<class>/<{medium.noun}>"
    return f"it wants <root>/train/{classes} and <root>/test/{classes}, or <root>/{classes}"


def _is_of(name: str, medium: Medium) -> bool:
    return os.path.splitext(name)[1].lower() in medium.endings  # noqa: PTH122 (called for every file of the source)


def _are_splits(root: Path, folders: Sequence[str], medium: Medium) -> bool:
    """Whether the top folders are splits and not classes, which may be called `train` too and may have subfolders."""
    divided = [name for name in folders if _folder_names(root / name) and not _holds_files(root / name, medium)]
    # Without a train these are splits all the same, to be reported by choose_test and not taken for classes.
    return TRAIN in divided or (divided == list(folders) and all(_LIKE_A_SPLIT.match(name) for name in folders))


def _list_classes(root: Path, folder: Path, medium: Medium) -> list[Sample]:
    classes = _folder_names(folder)
    if not classes:
        raise UserError(f"{folder} holds no class folders; {_layout(medium)}")
    samples = [sample for name in classes for sample in _list_class(root, folder / name, medium)]
    return sorted(samples, key=lambda sample: sample.id)


def _list_class(root: Path, folder: Path, medium: Medium) -> list[Sample]:
    samples = [
        Sample(Path(path).relative_to(root).as_posix(), (folder.name,), medium.content(path))
        for path in _walk(str(folder), (), medium)
    ]
    if not samples:
        raise UserError(
            f"the class folder {folder} holds no {medium.noun}; fill it or remove it "
            f"(endings: {' '.join(sorted(medium.endings))})"
        )
    return samples


def _walk(folder: str, above: tuple[str, ...], medium: Medium) -> Iterator[str]:
    """Paths of all files of the medium below; links are followed, as data sets are often built of them."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} links back to a folder above itself; remove the link")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real), medium)
        elif _is_of(entry.name, medium):
            if not entry.is_file():
                raise UserError(f"{entry.path} is a broken link or no regular file; restore or remove it")
            yield entry.path


def _folder_names(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(str(folder)) if entry.is_dir()]


def _holds_files(folder: Path, medium: Medium) -> bool:
    return any(_is_of(entry.name, medium) and entry.is_file() for entry in _entries(str(folder)))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """All but the hidden, in an order that depends neither on the file system nor on the locale."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError as error:
        raise UserError(f"the folder {folder} may not be read ({error.strerror}); change its permissions") from error
