"""Reads YAML into plain dicts and lists, with limits on size, aliases and numbers.

PyYAML needs the loader below for this. ruamel.yaml has no limit on aliases, is half as fast, and reads `010` and `on`
differently (YAML 1.2). OmegaConf has limits, but not on numbers, keys and size, and adds its own `${...}` grammar.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from adapt.config.messages import shorten, show
from store.errors import UserError

MOST_BYTES = 256 << 10  # PyYAML takes seconds for each megabyte
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 64  # characters; PyYAML takes quadratic time to read 1:30:00 as seconds
_LONGEST_MESSAGE = 300
_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which SafeLoader resolves


class Loader(yaml.SafeLoader):
    """A `SafeLoader` that reads 1e-3 as a number and refuses duplicate keys, huge numbers and multiplying aliases."""

    def compose_document(self) -> yaml.Node | None:
        """The document as nodes; the limit applies before objects are made of them."""
        node = super().compose_document()
        if node and _count_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases written out it holds more than {_MOST_VALUES:,} values")
        return node


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of values of a node; an alias counts each time it is used."""
    if id(node) not in counted:
        counted[id(node)] = 0  # a node that contains itself is refused later, by the constructor
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        counted[id(node)] = 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(node)]


def _construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[str] = set()
    for key in (loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE):
        if not isinstance(key, str):
            raise yaml.YAMLError(f"the key {show(key)} is not text{node.start_mark}")
        if key in keys:
            raise yaml.YAMLError(f"the key {show(key)} is given twice{node.start_mark}")
        keys.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    number = 0 if len(node.value) > _LONGEST_NUMBER else yaml.SafeLoader.construct_yaml_int(loader, node)
    if len(node.value) > _LONGEST_NUMBER or abs(number) >= 2**64:
        raise yaml.YAMLError(f"the number {show(node.value)} has more than 64 bits{node.start_mark}")
    return number


Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UserError: the file cannot be read, is too large, or is not a YAML mapping.
    """
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            limit = f"{MOST_BYTES >> 10} KiB"
            raise UserError(f"{path} is larger than {limit}, the limit of a configuration; make it smaller")
        text = content.decode("utf-8")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from error
    except (ValueError, RuntimeError) as error:  # a NUL in the path, no home folder of that user
        raise UserError(f"cannot read {path}: {error}") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise UserError(f"{path} must hold sections such as `data:` and `backbone:`, but holds {found}")
    return document


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML with the limits of a configuration.

    Args:
        where: the file or option that the text comes from, for messages.

    Raises:
        UserError: not YAML, or beyond a limit.
    """
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except Exception as error:  # for texts such as `!!int ""` PyYAML raises errors of many kinds
        reason = shorten(" ".join(str(error).split()), _LONGEST_MESSAGE)
        raise UserError(f"{where} is not valid YAML: {reason}") from error
