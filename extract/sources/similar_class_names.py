"""Class names that look alike: most often one class that was spelled in two ways."""

import unicodedata
import warnings
from collections.abc import Sequence

from store.errors import Note

_MOST_PAIRS = 5  # that the note tells


def note_similar(place: str, classes: Sequence[str]) -> None:
    """Warn of names that differ only in case, spaces, Unicode form, or in how a number is written."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_essence(name), []).append(name)
    groups = [" and ".join(map(ascii, names)) for names in alike.values() if len(names) > 1]
    if groups:
        more = ", ..." if len(groups) > _MOST_PAIRS else ""
        warnings.warn(
            f"{place} has classes whose names are alike but for case, spaces, Unicode form or the way a number is "
            f"written: {', '.join(groups[:_MOST_PAIRS])}{more}; give them one name if they are one class",
            Note,
            stacklevel=2,
        )


def _essence(name: str) -> str:
    """`1` of `01` and `1.0`; else the name without the differences that do not show."""
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    whole, _, decimals = plain.partition(".")
    is_whole_number = whole.isascii() and whole.isdigit() and not decimals.strip("0")
    return whole.lstrip("0") or "0" if is_whole_number else plain
