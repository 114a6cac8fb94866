"""Prints messages for the user on standard error, and JSON documents on standard output."""

import json
import os
import sys
from typing import Any


def log(message: str) -> None:
    """Print one line on standard error; of several processes only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        from store.console.visible import visible

        # one write, so that lines of several threads do not mix
        print(f"{visible(message)}\n", end="", file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print a JSON document on standard output."""
    print(json.dumps(document, indent=1))
