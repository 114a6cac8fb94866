"""The text of pipeline.yaml, with `-o` overrides, as plain dicts and lists."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from adapt.config.messages import show
from adapt.config.text_fields import Empty, empty_text
from store.errors import UserError

MOST_BYTES = 256 << 10  # PyYAML takes seconds for each megabyte
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 64  # characters; PyYAML's reading of 1:30:00 as seconds is quadratic
_LONGEST_MESSAGE = 300
_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which SafeLoader resolves by itself


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice, a huge number and aliases that multiply."""

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node and _count_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases written out it holds more than {_MOST_VALUES:,} values")
        return node


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Values from a node down, an alias as often as it is used."""
    if id(node) not in counted:
        counted[id(node)] = 0  # met again below itself; refused when it is constructed
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        counted[id(node)] = 1 + sum(_count_values(part, counted) for part in inner)
    return counted[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key in (loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE):
        if not isinstance(key, str):
            raise yaml.YAMLError(f"the key {show(key)} is no text{node.start_mark}")
        if key in seen:
            raise yaml.YAMLError(f"the key {show(key)} is given twice{node.start_mark}")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = 0 if len(node.value) > _LONGEST_NUMBER else yaml.SafeLoader.construct_yaml_int(loader, node)
    if len(node.value) > _LONGEST_NUMBER or abs(number) >= 2**64:
        raise yaml.YAMLError(f"the number {show(node.value)} has more than 64 bits{node.start_mark}")
    return number


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_document(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], model: type[BaseModel]
) -> dict[str, Any]:
    """A YAML file, or a mapping as it is, with overrides merged in.

    Args:
        model: the fields of the document. An override of one that holds text is taken as it stands; others are YAML.

    Raises:
        UserError: no such file, not YAML, an override of another form.
    """
    document = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        document = _override(document, override, model)
    return document


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.expanduser().open("rb") as file:
            text = _limited(path, file.read(MOST_BYTES + 1)).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:  # no UTF-8, a NUL in the path, no home folder of that user
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"cannot read {path}: {reason}") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        given = "nothing" if document is None else type(document).__name__
        raise UserError(f"{path} must hold sections such as `data:` and `backbone:`, but holds {given}")
    return document


def _limited(path: Path, content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES >> 10} KiB, the limit of a configuration; make it smaller")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """What YAML holds, read with the limits of a configuration.

    Raises:
        UserError: it is no YAML, or beyond a limit; `where` names it.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except Exception as error:  # for texts such as `!!int ""` PyYAML fails in many ways of its own
        raise UserError(f"{where} is not valid YAML: {_cut(' '.join(str(error).split()))}") from error


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 3]}..."


def _override(document: dict[str, Any], override: str, model: type[BaseModel]) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UserError(f"-o {_cut(override)}: write it as -o section.key=value, for example -o train.epochs=5")
    empty = empty_text(model, path)
    if empty is None or text.startswith(("'", '"')):
        value = _yaml_value(text, f"-o {_cut(override)}")
    else:
        value = _text_value(text, empty, f"-o {_cut(override)}")
    replaced: dict[str, Any] = _put(document, path, value)
    return replaced


def _text_value(text: str, empty: Empty, where: str) -> str | None:
    """A text as it stands; YAML would cut it at ` #`, and make something else of `no`, `1e3` or a date."""
    if text != text.strip():
        raise UserError(f"{where}: the value begins or ends with a blank; leave it out, or put the value in quotes")
    return None if empty is Empty.NULL and text in ("", "null") else text


def _yaml_value(text: str, where: str) -> Any:
    value = parse_yaml(text, where)
    end = 0
    for token in yaml.scan(text, _Loader):
        if text[end : token.start_mark.index].strip():
            raise UserError(
                f"{where}: what follows ` #` is a comment in YAML; put the value in quotes, or leave it out"
            )
        end = max(end, token.end_mark.index)
    return value


def _put(base: Any, path: list[str], value: Any) -> Any:
    """A copy in which the value stands at a path, in the place of what was there."""
    if not path:
        return value
    inner = base if isinstance(base, dict) else {}
    return inner | {path[0]: _put(inner.get(path[0]), path[1:], value)}
