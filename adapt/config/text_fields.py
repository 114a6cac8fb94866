"""Which keys of a configuration hold text: what is given for them with `-o` needs no YAML to be read."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


class Empty(Enum):
    """What an empty text means to a field that takes text."""

    TEXT = "text"
    NULL = "null"  # which a path, that cannot be empty, refuses


def empty_text(model: type[BaseModel], key: Sequence[str]) -> Empty | None:
    """What an empty text means at a key; None where the field takes other things than text, or there is none."""
    members = _members(model)
    for part in key:
        fields = [member.model_fields.get(part) for member in members if _is_model(member)]
        members = [member for field in fields if field for member in _members(field.annotation)]
    if not members or not all(map(_is_text, members)):
        return None
    return Empty.TEXT if str in members and NoneType not in members else Empty.NULL


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the one that it is."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _is_text(member: Any) -> bool:
    if get_origin(member) is Literal:
        return all(isinstance(value, str) for value in get_args(member))
    return member in (str, Path, NoneType)
