"""Explains validation errors of a configuration in the user's own keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from store.console.visible import visible
from store.errors import did_you_mean

_LONGEST_VALUE = 100  # characters
_MOST_MISTAKES = 20

Key = tuple[int | str, ...]


def explain(error: ValidationError, model: type[BaseModel], more_keys: Sequence[str] = ()) -> str:
    """All mistakes, one a line: the key, the given value, the legal values.

    Args:
        more_keys: further legal keys of the whole, which the caller has removed before validation.
    """
    by_key: dict[Key, str] = {}
    for detail in error.errors():
        place = _locate(detail["loc"], model)
        if place.key not in by_key:  # pydantic reports every branch of a union; the first is enough
            by_key[place.key] = _explain_one(place, detail, more_keys, model)
    lines = list(by_key.values())
    more = [f"and {len(lines) - _MOST_MISTAKES} more mistakes"] if len(lines) > _MOST_MISTAKES else []
    return "\n".join(lines[:_MOST_MISTAKES] + more)


@dataclass(frozen=True)
class _Place:
    """A key as the user writes it, and its section.

    Args:
        field: None if the key is a section or unknown.
        is_named: whether the key is a section of a map such as `datasets:`, whose name is the user's own.
    """

    key: Key
    section: type[BaseModel]
    field: FieldInfo | None
    is_named: bool = False

    @property
    def name(self) -> str:
        """`section.key`, on one line."""
        return shorten(visible(".".join(map(str, self.key))).replace("\n", "\\n"), _LONGEST_VALUE)


def _locate(loc: Key, model: type[BaseModel]) -> _Place:
    """Find the key of an error; names and numbers that pydantic adds inside unions and lists are cut off."""
    section, depth, in_map = model, 0, False
    while depth < len(loc):
        part = loc[depth]
        field = section.model_fields.get(part) if isinstance(part, str) else None
        inner: Any = field.annotation if field else None
        depth += 1
        if get_origin(inner) is dict:
            if not _is_section(get_args(inner)[1]) or depth == len(loc):
                return _Place(loc[: depth + 1], section, field)
            # a map of named sections
            inner, depth, in_map = get_args(inner)[1], depth + 1, True
        if not _is_section(inner):
            return _Place(loc[:depth], section, field)
        section = inner
    return _Place(loc, section, None, in_map)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _explain_one(place: _Place, detail: Any, more_keys: Sequence[str], root: type[BaseModel]) -> str:
    name, field = place.name, place.field
    reason = str(detail["msg"]).removeprefix("Value error, ")
    # an error of a whole section names the keys itself
    if not name or (field is None and detail["type"] == "value_error"):
        return f"{name}: {reason}" if place.is_named else reason
    keys = ", ".join(place.section.model_fields)
    if detail["type"] == "extra_forbidden" and field is None:
        more = more_keys if len(place.key) == 1 else ()
        legal, wrong = [*place.section.model_fields, *more], str(place.key[-1])
        return f"{name}: unknown key; legal keys here: {', '.join(legal)}{_suggest(wrong, legal, root)}"
    given = "is missing" if detail["type"] == "missing" else f"given {show(detail['input'])}"
    if field is None and detail["type"] != "invalid_key":
        return f"{name}: {given}; legal: a section with the keys {keys}"
    if field and field.description:
        return f"{name}: {given}; legal: {field.description}"
    return f"{name}: {given}; {reason[0].lower() + reason[1:]}"


def _suggest(wrong: str, legal: Sequence[str], root: type[BaseModel]) -> str:
    """A legal key with a slip, else the section that has such a key, else legal keys that are near."""
    if slip := did_you_mean(wrong, legal, likeness=0.85):
        return slip
    sections = {name: field.annotation for name, field in root.model_fields.items() if _is_section(field.annotation)}
    elsewhere = {f"{name}.{key}": key for name, section in sections.items() for key in section.model_fields}  # type: ignore[union-attr]
    found = [path for path, key in elsewhere.items() if key == wrong]
    return f"; did you mean {' or '.join(found[:2])}?" if found else did_you_mean(wrong, legal)


def show(value: object) -> str:
    """A value, short enough for a message."""
    try:
        return shorten(repr(value), _LONGEST_VALUE)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def shorten(text: str, length: int) -> str:
    """A text of at most so many characters, with `...` in place of the rest."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
