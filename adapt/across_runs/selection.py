"""Selects result rows by their values: `method=losa`, `options.rank=8`."""

import json
from collections.abc import Sequence
from typing import Any

from adapt.run_dir.results import Row
from store.errors import UserError

_NESTED = ("options", "conditions")


def select(rows: Sequence[Row], conditions: Sequence[str]) -> tuple[Row, ...]:
    """The rows that fulfill all conditions.

    Args:
        rows: any rows.
        conditions: `NAME=VALUE`, where NAME is a field of `Row`, or `options.NAME` or `conditions.NAME`.

    Raises:
        UserError: a condition is no such text, no row has the name, or no row fulfills the condition.
    """
    selected = tuple(rows)
    for condition in conditions:
        name, separator, value = condition.partition("=")
        if not separator:
            raise UserError(f"--where {condition!r}: legal: NAME=VALUE, such as method=losa or options.rank=8")
        selected = _select_one(selected, name.strip(), value.strip())
    return selected


def _select_one(rows: Sequence[Row], name: str, value: str) -> tuple[Row, ...]:
    fields = [_fields(row) for row in rows]
    if name not in (legal := {key for of_row in fields for key in of_row}):
        raise UserError(f"--where {name}={value}: no result has {name!r}; legal: {', '.join(sorted(legal))}")
    pairs = zip(rows, fields, strict=True)
    selected = tuple(row for row, of_row in pairs if name in of_row and _is_equal(of_row[name], value))
    if not selected:
        there = sorted({_text(of_row[name]) for of_row in fields if name in of_row})
        raise UserError(f"--where {name}={value}: no result has this value; there are: {', '.join(there[:20])}")
    return selected


def _fields(row: Row) -> dict[str, Any]:
    """The values of a row by the name that a condition gives them."""
    plain = {name: value for name, value in row.model_dump().items() if name not in _NESTED}
    return plain | {f"{name}.{key}": value for name in _NESTED for key, value in getattr(row, name).items()}


def _is_equal(found: Any, text: str) -> bool:
    """Whether a value is the given one, which may be written in any way that JSON allows: `0.001` or `1e-3`."""
    if isinstance(found, str):
        return found == text
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, bool) == isinstance(given, bool) and bool(found == given)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
