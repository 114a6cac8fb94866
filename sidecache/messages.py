"""Logs messages for the user, and prints JSON documents on standard output."""

import json
from typing import Any


def log(message: str) -> None:
    """Log one line; see `store.console.log`."""
    from store.console import log as of_store  # late: `main` first refuses other packages of this name

    of_store.log(message)


def print_json(document: Any) -> None:
    """Print a JSON document on standard output."""
    print(json.dumps(document, indent=1))
