"""Files that a listing does not take: counted by ending and reported in one note, so that none is silently missing."""

import os
import warnings
from collections import Counter

from store.errors import Note

# What systems, file servers and archivers leave beside data: thumbnails, trash, attributes. In lower case.
_DROPPINGS = frozenset(
    (
        *("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
_MOST_ENDINGS = 5  # that a note tells


def is_dropping(name: str) -> bool:
    """Whether a file or folder of this name is no part of the user's data; such are ignored without a note."""
    return name.lower() in _DROPPINGS


class LeftOut:
    """Counts of the files left out for one reason, by ending, with an example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, path: str) -> None:
        ending = os.path.splitext(path)[1].lower() or "no ending"  # noqa: PTH122 (called for every such file)
        self._counts[ending] += 1
        self._examples.setdefault(ending, path)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        """Such as `2 with .heic ('b/IMG_1.HEIC'), 1 with no ending ('b/x')`."""
        counts = self._counts.most_common()
        told = ", ".join(f"{n:,} with {ending} ({self._examples[ending]!r})" for ending, n in counts[:_MOST_ENDINGS])
        return told + (", ..." if len(counts) > _MOST_ENDINGS else "")

    def note(self, place: object, reason: str) -> None:
        """Warn, if there are any."""
        if self:
            n = self._counts.total()
            files = "1 file is" if n == 1 else f"{n:,} files are"
            warnings.warn(f"{place}: {files} left out, {reason}: {self}", Note, stacklevel=2)
