"""Warns of class names that look alike: most often they are one class, spelled in two ways."""

import unicodedata
import warnings
from collections.abc import Sequence

from store.errors import Note

_MAX_PAIRS = 5  # named in the warning


def warn_of_similar_names(dataset: str, classes: Sequence[str]) -> None:
    """Warn of names that differ only in case, spaces, Unicode form, or in how a number is written."""
    by_normal_form: dict[str, list[str]] = {}
    for name in classes:
        by_normal_form.setdefault(_normalize(name), []).append(name)
    groups = [" and ".join(map(ascii, names)) for names in by_normal_form.values() if len(names) > 1]
    if groups:
        more = ", ..." if len(groups) > _MAX_PAIRS else ""
        warnings.warn(
            f"{dataset} has classes whose names differ only in case, spaces, Unicode form or the way a number is "
            f"written: {', '.join(groups[:_MAX_PAIRS])}{more}; if they are one class, give them one name",
            Note,
            stacklevel=2,
        )


def _normalize(name: str) -> str:
    """The name without invisible differences; `1` for `01` and `1.0`."""
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    whole, _, decimals = plain.partition(".")
    if whole.isascii() and whole.isdigit() and not decimals.strip("0"):
        return whole.lstrip("0") or "0"
    return plain
