"""Replaces `${VARIABLE}` in a configuration from the environment, and restores it in the files that a job writes.

A variable may hold a secret, such as a token in a URL: `config.yaml`, the report and the cards of adaptors contain the
name of the variable, never its value. OmegaConf is not used: its `${NAME}` refers to a key of the configuration, and it
refuses texts such as `a${b`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from adapt.config.messages import show
from store.errors import UserError

_VARIABLE = re.compile(r"\$\{(\w+)\}")

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class ExpandedText:
    """A text of a configuration that holds variables.

    Args:
        keys: the path to it in the configuration.
        written: with the variables.
        value: with the values of the variables.
    """

    keys: Keys
    written: str
    value: str

    def restore(self, value: str) -> str:
        """The text with its variables.

        If the value has changed since, but only after the last variable, the change is kept: a store beside the first
        one has another ending.
        """
        head, _, tail = self.written.rpartition("}")
        start = self.value.removesuffix(tail)
        if value == self.value or not self.value.endswith(tail) or not value.startswith(start):
            return self.written
        return f"{head}}}{value.removeprefix(start)}"


def expand(document: Any) -> Any:
    """A copy of a document with the variables in all texts replaced.

    Raises:
        UserError: a variable is not set, or a text cannot be written as UTF-8.
    """
    if isinstance(document, dict):
        return {key: expand(value) for key, value in document.items()}
    if isinstance(document, list):
        return [expand(value) for value in document]
    return expand_text(document) if isinstance(document, str) else document


def expand_text(text: str) -> str:
    """A text with its variables replaced; raises what `expand` raises."""
    expanded = _VARIABLE.sub(lambda match: _value(match[1], text), text)
    try:
        expanded.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{show(expanded)} cannot be written as UTF-8; leave such characters out") from error
    return expanded


def _value(name: str, text: str) -> str:
    if name not in os.environ:
        raise UserError(f"{show(text)}: the environment variable {name} is not set; set it, or write the path out")
    return os.environ[name]


def expanded_texts(document: Any, keys: Keys = ()) -> Iterator[ExpandedText]:
    """All texts of a document that hold a variable; raises what `expand` raises."""
    if isinstance(document, str) and _VARIABLE.search(document):
        yield ExpandedText(keys, document, expand_text(document))
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield from expanded_texts(value, (*keys, key))


def restore_variables(document: dict[str, Any], texts: Iterable[ExpandedText]) -> dict[str, Any]:
    """A copy of an expanded document that has the variables again."""
    restored = deepcopy(document)
    for text in texts:
        parent = _find(restored, text.keys[:-1])
        if isinstance(value := _find(parent, text.keys[-1:]), str):
            parent[text.keys[-1]] = text.restore(value)
    return restored


def _find(document: Any, keys: Keys) -> Any:
    """The value at a path in a document; None if there is no such path."""
    for key in keys:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document
