"""Applies `-o section.key=value` overrides to a configuration.

If the key holds text, the value is taken literally, since YAML would cut it at ` #` and convert `no`, `1e3` or a date.
All other values are YAML. OmegaConf's dotlist reads every value as YAML: of the 47 texts of
tests/adapt/test_overrides.py it keeps 11.
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from adapt.config.messages import shorten
from adapt.config.yaml_text import Loader, parse_yaml
from store.errors import UserError

_LONGEST_OVERRIDE = 300  # characters in a message


def apply_overrides(
    document: dict[str, Any], overrides: Sequence[str], model: type[BaseModel] | UnionType
) -> dict[str, Any]:
    """A copy of a document with overrides applied, in their order.

    Args:
        model: its fields say which keys hold text; a union has the fields of all its models.

    Raises:
        UserError: not of the form `section.key=value`, or the value is not YAML.
    """
    for override in overrides:
        where = f"-o {shorten(override, _LONGEST_OVERRIDE)}"
        key, equals, text = override.partition("=")
        keys = [part.strip() for part in key.split(".")]
        if not equals or not all(keys):
            raise UserError(f"{where}: write it as -o section.key=value, for example -o train.epochs=5")
        kind = text_kind(model, keys)
        is_quoted = text.startswith(("'", '"'))
        value = _parse_value(text, where) if kind is None or is_quoted else _literal_text(text, kind, where)
        document = _replace(document, keys, value)
    return document


def _replace(base: Any, keys: list[str], value: Any) -> Any:
    """A copy of nested dicts with the value at a path of keys."""
    if not keys:
        return value
    parent = base if isinstance(base, dict) else {}
    return parent | {keys[0]: _replace(parent.get(keys[0]), keys[1:], value)}


def _literal_text(text: str, kind: "TextKind", where: str) -> str | None:
    if text != text.strip():
        raise UserError(f"{where}: the value begins or ends with a blank; leave it out, or put the value in quotes")
    return None if kind is TextKind.NULLABLE and text in ("", "null") else text


def _parse_value(text: str, where: str) -> Any:
    """A YAML value without comments: a text behind ` #` was probably meant as a part of it."""
    value = parse_yaml(text, where)
    end = 0
    for token in yaml.scan(text, Loader):
        if text[end : token.start_mark.index].strip():
            raise UserError(
                f"{where}: what follows ` #` is a comment in YAML; put the value in quotes, or leave it out"
            )
        end = max(end, token.end_mark.index)
    return value


class TextKind(Enum):
    """Whether a field of text reads an empty value and `null` as null."""

    PLAIN = "plain"
    NULLABLE = "nullable"  # paths too: they refuse null, as they refuse an empty text


def text_kind(model: type[BaseModel] | UnionType, keys: Sequence[str]) -> TextKind | None:
    """The kind of the field at a path of keys; None if it does not hold text, or does not exist."""
    types = _union_members(model)
    for key in keys:
        types = [inner for member in types for inner in _types_at(member, key)]
    if not types or not all(map(_is_text, types)):
        return None
    return TextKind.PLAIN if str in types and NoneType not in types else TextKind.NULLABLE


def _types_at(member: Any, key: str) -> list[Any]:
    """The types of a model's field, or of the values of a dict with any keys."""
    if get_origin(member) is dict:
        return _union_members(get_args(member)[1])
    field = member.model_fields.get(key) if _is_model(member) else None
    return _union_members(field.annotation) if field else []


def _union_members(annotation: Any) -> list[Any]:
    """The types of a union; of another annotation, its one type."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _union_members(part)]
    return [annotation]


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)


def _is_text(member: Any) -> bool:
    if get_origin(member) is Literal:
        return all(isinstance(value, str) for value in get_args(member))
    return member in (str, Path, NoneType)
