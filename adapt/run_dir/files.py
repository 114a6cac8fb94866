"""Writes small files of a run directory atomically, and reads them with a checksum.

Each JSON object that is read back contains a checksum of its content, like the documents of a store. It covers the
values and not the text, so that a JSON tool may reformat the file; a value that was edited by hand is refused.
"""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from store.errors import JobError, UserError
from store.local.durable_files import write_files

CHECKSUM = "checksum"  # the field of an object that holds its checksum
_MOST_BYTES = 64 << 20  # of a file that is read; ten thousand result rows take a quarter of it


def make_run_dir(run_dir: Path) -> None:
    """Make the run directory of a job, unless it exists; raises what `make_folder` raises."""
    make_folder(run_dir, "checkpoints")


def make_folder(run_dir: Path, inner: str = ".") -> None:
    """Make a run directory and a folder in it, unless they exist.

    Raises:
        UserError: no folder can be made at this path.
    """
    try:
        (run_dir / inner).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; see `write_bytes`."""
    write_bytes(path, memoryview(text.encode()))


def write_bytes(path: Path, content: memoryview) -> None:
    """Write a file atomically: a reader, or a crash at any time, finds either the old or the new file complete.

    Raises:
        JobError: the file cannot be written; the old one is kept.
    """
    try:
        write_files([(path, [content])])
    except OSError as error:
        reason = error.strerror or error
        raise JobError(f"{path} cannot be written ({reason}); what was there before is kept") from error


def read_text(path: Path, most_bytes: int = _MOST_BYTES) -> str:
    """Read a text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a regular file (reading a pipe could block), larger than `most_bytes`, or not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return path.read_text(encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write an object with its checksum; raises what `write_text` raises."""
    write_text(path, json.dumps(with_checksum(document), indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_json` wrote.

    Raises:
        JobError: the file cannot be read, or was changed.
    """
    try:
        return without_checksum(parse_json(read_text(path)))
    except OSError as error:
        raise damaged(path, error.strerror) from error
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> JobError:
    """The error for a damaged file whose content can be computed again."""
    return JobError(f"{path} is damaged ({reason}); delete it, and its content is computed again")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def with_checksum(document: dict[str, Any]) -> dict[str, Any]:
    """A copy of an object, with a checksum of its other fields as the last field."""
    return {**document, CHECKSUM: _checksum(document)}


def without_checksum(document: Any) -> dict[str, Any]:
    """The object that `with_checksum` was given.

    Raises:
        ValueError: not an object, or its content does not match its checksum.
    """
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    content = {name: value for name, value in document.items() if name != CHECKSUM}
    if document.get(CHECKSUM) != _checksum(content):
        raise ValueError("its content does not match its checksum: it was damaged, or edited by hand")
    return content


def _checksum(document: dict[str, Any]) -> str:
    as_json = json.loads(json.dumps(document))  # tuples become lists, and all keys strings, before they are sorted
    return hashlib.blake2b(json.dumps(as_json, sort_keys=True).encode(), digest_size=8).hexdigest()
