"""Expands what a user names on the command line: files, folders, and lists of both."""

import sys
from collections.abc import Sequence
from pathlib import Path

from extract.sources.folders import walk_files
from extract.sources.ignored_files import IgnoredFiles
from extract.sources.samples import FileKind
from store.errors import UserError


def expand_paths(paths: Sequence[Path], kind: FileKind) -> list[Path]:
    """Replace every folder by the files of a kind below it; other paths stay as they are, whatever they name.

    Files of other kinds are ignored with a warning.

    Raises:
        UserError: a folder holds no file of the kind, may not be read, or links back to one above it.
    """
    found = list[Path]()
    for path in paths:
        found.extend(_files_below(path, kind) if path.is_dir() else [path])
    return found


def read_path_list(file: Path) -> list[Path]:
    """The paths of a text file, one a line and relative to its folder; `-` is standard input.

    Raises:
        UserError: the file cannot be read.
    """
    try:  # names of files may be any bytes
        text = sys.stdin.read() if file == Path("-") else file.read_text("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the list {file}: {error.strerror}; give a text file, one path a line") from error
    return [file.parent / line for line in text.split("\n") if line.strip()]


def _files_below(folder: Path, kind: FileKind) -> list[Path]:
    found, ignored = list[Path](), IgnoredFiles()
    for entry in walk_files(str(folder)):
        if kind.includes(entry.name):
            found.append(Path(entry.path))
        else:
            ignored.add(str(Path(entry.path).relative_to(folder)))
    if not found:
        raise kind.none_in(f"the folder {folder}", "give another one", ignored)
    kind.warn_of_others(ignored, folder)
    return found
