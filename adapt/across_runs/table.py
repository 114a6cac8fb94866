"""A table for readers and for programs: texts in columns, and the same figures as records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell for readers.

    Args:
        text: its text, which may hold any character.
        is_best: whether it is shown in bold.
    """

    text: str
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for readers and for programs.

    Args:
        title: what all rows have in common; may be empty.
        header: one text a column.
        n_names: how many of the first columns hold names; the others hold figures.
        rows: the cells.
        legend: explains marks and figures.
        records: what programs read; all have the same keys.
    """

    title: str
    header: tuple[str, ...]
    n_names: int
    rows: tuple[tuple[Cell, ...], ...]
    legend: tuple[str, ...]
    records: tuple[dict[str, Any], ...]


def split_common(names: Sequence[Mapping[str, str]]) -> tuple[str, list[str]]:
    """The names that all rows share as the title, and the keys of the others.

    Args:
        names: the names of every row by key; all rows have the same keys.
    """
    if not names:
        return "", []
    common = [key for key in names[0] if len({of_row[key] for of_row in names}) == 1]
    title = " · ".join(names[0][key] for key in common if names[0][key])
    return title, [key for key in names[0] if key not in common]
