"""What is wrong with a configuration, in the user's own keys."""

from collections.abc import Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from store.console.visible import visible

_LONGEST_VALUE = 100
_MOST_MISTAKES = 20

Key = tuple[int | str, ...]


def explain(error: ValidationError, model: type[BaseModel], more_keys: Sequence[str] = ()) -> str:
    """The mistakes, each on a line of its own: the key, what was given, what is legal.

    Args:
        more_keys: keys that are legal beside those of the model, because the caller took them out before.
    """
    by_key: dict[Key, str] = {}
    for detail in error.errors():
        key, section, field = _locate(detail["loc"], model)
        if key not in by_key:  # pydantic reports every branch of a union; the first will do
            by_key[key] = _explain_one(_name(key), detail, section, field, more_keys)
    lines = list(by_key.values())
    more = [f"and {len(lines) - _MOST_MISTAKES} more mistakes"] if len(lines) > _MOST_MISTAKES else []
    return "\n".join(lines[:_MOST_MISTAKES] + more)


def _name(key: Key) -> str:
    """`section.key`, on one line."""
    name = visible(".".join(map(str, key))).replace("\n", "\\n")
    return name if len(name) <= _LONGEST_VALUE else name[: _LONGEST_VALUE - 3] + "..."


def _locate(loc: Key, model: type[BaseModel]) -> tuple[Key, type[BaseModel], FieldInfo | None]:
    """The key as the user writes it, its section and its field; no field where the key is a section, or unknown.

    Where pydantic enters a union or a list it adds names and numbers of its own, which are cut.
    """
    section = model
    for depth, part in enumerate(loc):
        field = section.model_fields.get(part) if isinstance(part, str) else None
        inner: Any = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            n_parts = depth + 2 if get_origin(inner) is dict else depth + 1
            return loc[:n_parts], section, field
        section = inner
    return loc, section, None


def _explain_one(
    key: str, detail: Any, section: type[BaseModel], field: FieldInfo | None, more_keys: Sequence[str]
) -> str:
    reason = str(detail["msg"]).removeprefix("Value error, ")
    if not key or (field is None and detail["type"] == "value_error"):  # of a whole section: it names the keys itself
        return reason
    keys = ", ".join([*section.model_fields, *more_keys])
    if detail["type"] == "extra_forbidden" and field is None:
        return f"{key}: unknown key; legal keys here: {keys}"
    given = "is missing" if detail["type"] == "missing" else f"given {show(detail['input'])}"
    if field is None and detail["type"] != "invalid_key":
        return f"{key}: {given}; legal: a section with the keys {keys}"
    if field and field.description:
        return f"{key}: {given}; legal: {field.description}"
    return f"{key}: {given}; {reason[0].lower() + reason[1:]}"


def show(value: object) -> str:
    """A given value, short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
