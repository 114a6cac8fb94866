"""`${VARIABLE}` in a configuration: replaced from the environment for the job, and kept as written in what it leaves.

A variable may hold a secret, such as a token in a URL, so that `config.yaml`, the report and the cards of adaptors name
the variable, never its value. They are read again in an environment that sets it.
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
class Text:
    """A text of a configuration that holds variables: where it stands, as written, and what it came to."""

    keys: Keys
    written: str
    value: str

    def rewrite(self, value: str) -> str:
        """As written; of another value that begins as this one, as a store beside the first does, with its own end."""
        head, _, tail = self.written.rpartition("}")
        start = self.value.removesuffix(tail)
        if value == self.value or not self.value.endswith(tail) or not value.startswith(start):
            return self.written
        return f"{head}}}{value.removeprefix(start)}"


def expand(document: Any) -> Any:
    """A copy of a document in which every text has its variables replaced.

    Raises:
        UserError: a variable is not set, or a text cannot be written as UTF-8.
    """
    if isinstance(document, dict):
        return {key: expand(value) for key, value in document.items()}
    if isinstance(document, list):
        return [expand(value) for value in document]
    return expand_text(document) if isinstance(document, str) else document


def expand_text(text: str) -> str:
    """A text with its variables replaced. Errors are those of `expand`."""
    expanded = _VARIABLE.sub(lambda match: _value(match[1], text), text)
    try:
        expanded.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{show(expanded)} cannot be written as UTF-8; leave such characters out") from error
    return expanded


def texts_with_variables(document: Any, keys: Keys = ()) -> Iterator[Text]:
    """Every text of a document that holds a variable. Errors are those of `expand`."""
    if isinstance(document, str) and _VARIABLE.search(document):
        yield Text(keys, document, expand_text(document))
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield from texts_with_variables(value, (*keys, key))


def as_written(document: dict[str, Any], texts: Iterable[Text]) -> dict[str, Any]:
    """A copy of a document of values in which these texts stand as they were written."""
    copied = deepcopy(document)
    for text in texts:
        inner = _find(copied, text.keys[:-1])
        if isinstance(value := _find(inner, text.keys[-1:]), str):
            inner[text.keys[-1]] = text.rewrite(value)
    return copied


def _find(document: Any, keys: Keys) -> Any:
    """What stands at a place of a document; None where there is no such place."""
    for key in keys:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def _value(name: str, text: str) -> str:
    if name not in os.environ:
        raise UserError(f"{show(text)}: the environment variable {name} is not set; set it, or write the path out")
    return os.environ[name]
