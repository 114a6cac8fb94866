"""Lists files in class folders: `root/<split>/<class>/**/file`, or `root/<class>/**/file` without splits."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from extract.config import DataConfig
from extract.sources.data_root import root_folder
from extract.sources.ignored_files import IgnoredFiles, is_system_file
from extract.sources.samples import IMAGES, FileKind, Sample, SourceSamples
from extract.sources.splits import TRAIN, choose_splits
from store.errors import UserError

_LIKE_A_SPLIT = re.compile(r"(train|test|val|eval|dev)", re.IGNORECASE)
# Words in a folder's name, as in Intel's `seg_train` and `seg_test`.
_TRAIN_WORD = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
_TEST_WORD = re.compile(r"(?<![a-z])(test(ing)?|val(id|idation)?|eval(uation)?|dev)(?![a-z])", re.IGNORECASE)


def list_folder(config: DataConfig, kind: FileKind = IMAGES) -> SourceSamples:
    """All samples of the folder `data.root`."""
    return _FolderLister(root_folder(config), kind).list_samples(config)


@dataclass(frozen=True)
class _FolderLister:
    """Lists the files of one kind below a root folder."""

    root: Path
    kind: FileKind
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)  # files in class folders, of other extensions

    def list_samples(self, config: DataConfig) -> SourceSamples:
        names = _folder_names(self.root)
        if not names:
            raise UserError(f"data.root {self.root} holds no class folders; {self._layout()}")
        splits = names if self._are_splits(names) else []
        chosen = choose_splits(splits, config)
        train_folder = self.root / TRAIN if splits else self.root
        self._check_depth(train_folder)
        samples = SourceSamples(
            name=self.root.resolve().name,
            train=self._list_split(train_folder),
            test=None if chosen.test is None else self._list_split(self.root / chosen.test),
            validation=() if chosen.validation is None else self._list_split(self.root / chosen.validation),
            classes=tuple(_folder_names(train_folder)),  # sorted as text, as torchvision's ImageFolder does
        )
        self.kind.warn_of_others(self.ignored, self.root)
        used_splits = (TRAIN, chosen.test, chosen.validation)
        used = [self.root, *(self.root / split for split in used_splits if splits and split)]
        self._find_outside_classes(used).warn(self.root, "in no class folder")
        return samples

    def _layout(self) -> str:
        """The legal layouts, for messages."""
        files = f"<class>/<{self.kind.plural}>"
        return f"legal: <root>/train/{files} and <root>/test/{files}, or <root>/{files}"

    def _are_splits(self, names: Sequence[str]) -> bool:
        """Whether the top folders are splits, not classes: a class may be called `train` too, and have subfolders."""
        nested = [name for name in names if _folder_names(self.root / name)]
        without_files = [name for name in nested if not self._holds_files(self.root / name)]
        # Names such as `seg_train` and `seg_test` are taken for splits, so that choose_splits reports that `train` is
        # missing; otherwise they would silently become classes.
        if any(map(_TRAIN_WORD.search, nested)) and any(map(_TEST_WORD.search, nested)):
            return True
        if TRAIN in without_files:
            return True
        return without_files == list(names) and all(_LIKE_A_SPLIT.match(name) for name in names)

    def _check_depth(self, folder: Path) -> None:
        """Refuse `train/train/<class>` and the like, where the single folder in between would be the only class."""
        names = _folder_names(folder)
        if len(names) != 1 or self._holds_files(folder / names[0]):
            return
        if below := _folder_names(folder / names[0]):
            raise UserError(
                f"{folder} holds only the folder {names[0]!r}, which holds the folders {', '.join(below[:5])}"
                f"{', ...' if len(below) > 5 else ''}: move these up into {folder}; {self._layout()}"
            )

    def _list_split(self, folder: Path) -> list[Sample]:
        classes = _folder_names(folder)
        if not classes:
            raise UserError(f"{folder} holds no class folders; {self._layout()}")
        samples = [sample for name in classes for sample in self._list_class(folder / name)]
        return sorted(samples, key=lambda sample: sample.id)

    def _list_class(self, folder: Path) -> list[Sample]:
        samples, others = list[Sample](), IgnoredFiles()
        for entry in walk_files(str(folder)):
            name = self._relative(entry.path)
            if not self.kind.includes(entry.name):
                self.ignored.add(name)
                others.add(name)
            elif entry.is_file():
                samples.append(Sample(name, (folder.name,), self.kind.content(entry.path)))
            else:
                raise UserError(f"{entry.path} is a broken link or no regular file; restore or remove it")
        if not samples:
            raise self.kind.none_in(f"the class folder {folder}", "fill it or remove it", others)
        return samples

    def _find_outside_classes(self, folders: Sequence[Path]) -> IgnoredFiles:
        """Files of the kind that are directly in these folders, beside the class folders."""
        found = IgnoredFiles()
        for folder in folders:
            for entry in _entries(str(folder)):
                if self.kind.includes(entry.name) and not entry.is_dir():
                    found.add(self._relative(entry.path))
        return found

    def _holds_files(self, folder: Path) -> bool:
        return any(self.kind.includes(entry.name) and entry.is_file() for entry in _entries(str(folder)))

    def _relative(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()


def walk_files(folder: str, parents: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """All files below except hidden and system files; links are followed, because data sets are often made of them.

    Args:
        folder: where to look.
        parents: the folders above it that are being walked, with links resolved.

    Raises:
        UserError: a folder may not be read, or links back to one above it.
    """
    real = os.path.realpath(folder)
    if real in parents:
        raise UserError(f"{folder} links back to a folder above itself; remove the link")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from walk_files(entry.path, (*parents, real))
        else:
            yield entry


def _folder_names(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(str(folder)) if entry.is_dir()]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """All entries except hidden and system files, in the same order on every file system and in every locale."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if not (e.name.startswith(".") or is_system_file(e.name))),
                key=lambda entry: entry.name,
            )
    except PermissionError as error:
        raise UserError(f"the folder {folder} may not be read ({error.strerror}); change its permissions") from error
