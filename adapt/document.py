"""The text of pipeline.yaml, with `-o` overrides and environment variables, as plain dicts and lists."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from store.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which SafeLoader resolves by itself


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
    for key in keys:
        if not isinstance(key, str):
            raise yaml.YAMLError(f"the key {key!r} is no text{node.start_mark}")
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_document(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A YAML file, or a mapping as it is, with overrides merged in and every ${VARIABLE} replaced.

    Raises:
        UserError: no such file, not YAML, an override of another form, a variable that is not set.
    """
    document = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        document = _override(document, override)
    try:
        expanded: dict[str, Any] = _expand(document)
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply, or holds itself") from error
    return expanded


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # no UTF-8, a NUL in the path, no home folder of that user
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"cannot read {path}: {reason}") from error
    document = _parse_yaml(text, str(path))
    if not isinstance(document, dict):
        given = "nothing" if document is None else type(document).__name__
        raise UserError(f"{path} must hold sections such as `data:` and `backbone:`, but holds {given}")
    return document


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except Exception as error:  # for texts such as `!!int ""` PyYAML fails in many ways of its own
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _override(document: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UserError(f"-o {override}: write it as -o section.key=value, for example -o train.epochs=5")
    value = _parse_yaml(text, f"-o {override}")
    replaced: dict[str, Any] = _put(document, path, value)
    return replaced


def _put(base: Any, path: list[str], value: Any) -> Any:
    """A copy in which the value stands at a path, in the place of what was there."""
    if not path:
        return value
    inner = base if isinstance(base, dict) else {}
    return inner | {path[0]: _put(inner.get(path[0]), path[1:], value)}


def _expand(value: Any) -> Any:
    """Replace ${VARIABLE} in every text."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{value!r}: the environment variable {match[1]} is not set; set it, or write the path out")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", substitute, value)
