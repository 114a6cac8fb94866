"""Logs messages for the user: the logger `sidecache` of Python's `logging` writes lines to standard error.

`logging.getLogger("sidecache")` silences or redirects them: by its level, its handlers, or `propagate`.
"""

import logging
import os
import sys

from store.console.visible import visible

_LOGGER = logging.getLogger("sidecache")


class _StandardError(logging.Handler):
    """Writes the message, and nothing else, to what `sys.stderr` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line at once, so that lines of several threads do not mix."""
        print(f"{record.getMessage()}\n", end="", file=sys.stderr, flush=True)


_LOGGER.setLevel(logging.INFO)
_LOGGER.addHandler(_StandardError())
_LOGGER.propagate = False


def log(message: str) -> None:
    """Log one line at the level INFO, with control characters written out; of several processes only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        _LOGGER.info("%s", visible(message))
