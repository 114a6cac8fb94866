"""Small files of a run directory: written whole, and read with one clear error where they are damaged.

Every JSON object that the program reads back carries a checksum of its own content, as the documents of a store do. It
is of the values, so that any JSON tool may lay the file out anew; a value that was edited by hand is refused.
"""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from store.errors import JobError, UserError
from store.local.durable_files import write_files

CHECKSUM = "checksum"  # the field that holds an object's own checksum
_MOST_BYTES = 64 << 20  # of a file that is read; ten thousand rows of results take a quarter of it


def make_run_dir(run_dir: Path) -> None:
    """Make the run directory.

    Raises:
        UserError: the path is not one where a folder can be made.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error


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


def read_text(path: Path, most_bytes: int = _MOST_BYTES) -> str:
    """A whole file, of no more bytes than that.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a pipe would be waited for), too large, or no UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return path.read_text(encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write an object with its checksum. Errors are those of `write_text`."""
    write_text(path, json.dumps(with_checksum(document), indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        JobError: it is not that any more.
    """
    try:
        return without_checksum(parse_json(read_text(path)))
    except OSError as error:
        raise damaged(path, error.strerror) from error
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> JobError:
    """The error of a file that only saves work."""
    return JobError(f"{path} is damaged ({reason}); delete it, and what it held is computed anew")


def parse_json(text: str) -> Any:
    """JSON that the program wrote, or that somebody put in its place.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def with_checksum(document: dict[str, Any]) -> dict[str, Any]:
    """An object with a last field that vouches for the others."""
    return {**document, CHECKSUM: _checksum(document)}


def without_checksum(document: Any) -> dict[str, Any]:
    """The object as it was before `with_checksum`.

    Raises:
        ValueError: it is no object, or not the one that was written.
    """
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    content = {name: value for name, value in document.items() if name != CHECKSUM}
    if document.get(CHECKSUM) != _checksum(content):
        raise ValueError("its content does not fit its checksum: it was damaged, or edited by hand")
    return content


def _checksum(document: dict[str, Any]) -> str:
    read_back = json.loads(json.dumps(document))  # tuples are lists by then, and keys are texts
    return hashlib.blake2b(json.dumps(read_back, sort_keys=True).encode(), digest_size=8).hexdigest()
