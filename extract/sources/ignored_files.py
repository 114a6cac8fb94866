"""Counts the files of a source that are ignored, and reports them in one warning, so that none is missed silently."""

import os
import warnings
from collections import Counter

from store.errors import Note

# Files and folders that systems, file servers and archivers add beside data, in lower case.
_SYSTEM_FILES = frozenset(
    (
        *("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
_MAX_EXTENSIONS = 5  # named in a warning
_HEIF = {".heic", ".heif"}  # photos of phones; images where the package pillow-heif is installed


def is_system_file(name: str) -> bool:
    """Whether a file or folder of this name is not part of the user's data; these are ignored without a warning."""
    return name.lower() in _SYSTEM_FILES


class IgnoredFiles:
    """Counts the files that are ignored for one reason, by extension, with an example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, path: str) -> None:
        """Count a file."""
        extension = os.path.splitext(path)[1].lower() or "no extension"  # noqa: PTH122 (called for every such file)
        self._counts[extension] += 1
        self._examples.setdefault(extension, path)

    def __str__(self) -> str:
        """Such as `2 with .heic ('b/IMG_1.HEIC'), 1 with no extension ('b/x')`."""
        counts = self._counts.most_common()
        text = ", ".join(f"{n:,} with {ext} ({self._examples[ext]!r})" for ext, n in counts[:_MAX_EXTENSIONS])
        return text + (", ..." if len(counts) > _MAX_EXTENSIONS else "")

    def __bool__(self) -> bool:
        return bool(self._counts)

    def warn(self, place: object, reason: str) -> None:
        """Warn of the files at `place`, if there are any."""
        if self:
            n_files = self._counts.total()
            files = "1 file" if n_files == 1 else f"{n_files:,} files"
            remedy = "; pip install 'sidecache[heif]' to read them" if self._counts.keys() & _HEIF else ""
            warnings.warn(f"{place}: ignored {files} ({reason}): {self}{remedy}", Note, stacklevel=2)
