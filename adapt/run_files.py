"""Small files of a run directory: written whole, and read with one clear error where they are damaged."""

import json
from pathlib import Path
from typing import Any

from store.durable import write_files
from store.errors import JobError


def write_text(path: Path, text: str) -> None:
    """A reader, or a crash at any instant, finds the old file or the new one whole.

    Raises:
        JobError: it cannot be written; the old one stays.
    """
    try:
        write_files([(path, [memoryview(text.encode())])])
    except OSError as error:
        reason = error.strerror or error
        raise JobError(f"{path} cannot be written ({reason}); what was there before is kept") from error


def read_json(path: Path) -> Any:
    """What the program wrote there itself.

    Raises:
        JobError: it is no JSON any more.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise JobError(f"{path} is damaged ({error}); delete it, and what it held is computed anew") from error
