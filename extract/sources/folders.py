"""Files in folders: `root/<split>/<class>/**/file`, or `root/<class>/**/file` without splits."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from extract.config import DataConfig
from extract.sources.samples import IMAGES, TRAIN, Listing, Medium, Sample, choose_test, root_folder
from extract.sources.skipped_files import LeftOut, is_dropping
from store.errors import UserError

_LIKE_A_SPLIT = re.compile(r"(train|test|val|eval|dev)", re.IGNORECASE)
# Words of a folder's name, as in Intel's `seg_train` and `seg_test`.
_TRAIN_WORD = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
_TEST_WORD = re.compile(r"(?<![a-z])(test(ing)?|val(id|idation)?|eval(uation)?|dev)(?![a-z])", re.IGNORECASE)


def list_folder(config: DataConfig, medium: Medium = IMAGES) -> Listing:
    root = root_folder(config)
    folders = _folder_names(root)
    if not folders:
        raise UserError(f"data.root {root} holds no class folders; {_layout(medium)}")
    splits = folders if _are_splits(root, folders, medium) else []
    test = choose_test(splits, config)
    train_folder = root / TRAIN if splits else root
    _check_depth(train_folder, medium)
    used = [root, *(root / split for split in (TRAIN, test) if splits and split)]
    left_out = LeftOut()
    listing = Listing(
        name=root.resolve().name,
        train=_list_classes(root, train_folder, medium, left_out),
        test=None if test is None else _list_classes(root, root / test, medium, left_out),
        classes=tuple(_folder_names(train_folder)),  # sorted as text, as torchvision's ImageFolder does
    )
    left_out.note(root, f"as their endings are not those of {medium.noun}")
    _find_loose(root, used, medium).note(root, "as they lie beside the class folders")
    return listing


def _find_loose(root: Path, folders: Sequence[Path], medium: Medium) -> LeftOut:
    """Files of the medium that lie in no class folder."""
    loose = LeftOut()
    for folder in folders:
        for entry in _entries(str(folder)):
            if _is_of(entry.name, medium) and not entry.is_dir():
                loose.add(Path(entry.path).relative_to(root).as_posix())
    return loose


def _check_depth(folder: Path, medium: Medium) -> None:
    """Refuse `train/train/<class>` and the like, where the one folder in between would be the only class."""
    names = _folder_names(folder)
    if len(names) != 1 or _holds_files(folder / names[0], medium):
        return
    if below := _folder_names(folder / names[0]):
        raise UserError(
            f"{folder} holds nothing but the folder {names[0]!r}, and that the folders {', '.join(below[:5])}"
            f"{', ...' if len(below) > 5 else ''}: move these up into {folder}; {_layout(medium)}"
        )


def _layout(medium: Medium) -> str:
    classes = f"<class>/<{medium.noun}>"
    return f"it wants <root>/train/{classes} and <root>/test/{classes}, or <root>/{classes}"


def _is_of(name: str, medium: Medium) -> bool:
    return os.path.splitext(name)[1].lower() in medium.endings  # noqa: PTH122 (called for every file of the source)


def _are_splits(root: Path, folders: Sequence[str], medium: Medium) -> bool:
    """Whether the top folders are splits and not classes, which may be called `train` too and may have subfolders."""
    nested = [name for name in folders if _folder_names(root / name)]
    divided = [name for name in nested if not _holds_files(root / name, medium)]
    # Without a train these are splits all the same, to be reported by choose_test and not taken for classes.
    named = any(map(_TRAIN_WORD.search, nested)) and any(map(_TEST_WORD.search, nested))
    if TRAIN in divided or named:  # where files lie beside the classes of a split, its name must do
        return True
    return divided == list(folders) and all(_LIKE_A_SPLIT.match(name) for name in folders)


def _list_classes(root: Path, folder: Path, medium: Medium, left_out: LeftOut) -> list[Sample]:
    classes = _folder_names(folder)
    if not classes:
        raise UserError(f"{folder} holds no class folders; {_layout(medium)}")
    samples = [sample for name in classes for sample in _list_class(root, folder / name, medium, left_out)]
    return sorted(samples, key=lambda sample: sample.id)


def _list_class(root: Path, folder: Path, medium: Medium, left_out: LeftOut) -> list[Sample]:
    samples, others = list[Sample](), LeftOut()
    for entry in _walk(str(folder), ()):
        name = Path(entry.path).relative_to(root).as_posix()
        if not _is_of(entry.name, medium):
            left_out.add(name)
            others.add(name)
        elif entry.is_file():
            samples.append(Sample(name, (folder.name,), medium.content(entry.path)))
        else:
            raise UserError(f"{entry.path} is a broken link or no regular file; restore or remove it")
    if not samples:
        raise UserError(
            f"the class folder {folder} holds no {medium.noun}; fill it or remove it "
            f"(endings: {' '.join(sorted(medium.endings))}){f', but files: {others}' if others else ''}"
        )
    return samples


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """All files below; links are followed, as data sets are often built of them."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} links back to a folder above itself; remove the link")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry


def _folder_names(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(str(folder)) if entry.is_dir()]


def _holds_files(folder: Path, medium: Medium) -> bool:
    return any(_is_of(entry.name, medium) and entry.is_file() for entry in _entries(str(folder)))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """All but what is hidden or a dropping, in an order that depends neither on the file system nor on the locale."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if not (e.name.startswith(".") or is_dropping(e.name))),
                key=lambda entry: entry.name,
            )
    except PermissionError as error:
        raise UserError(f"the folder {folder} may not be read ({error.strerror}); change its permissions") from error
