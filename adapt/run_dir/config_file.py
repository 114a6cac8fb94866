"""Keeps the resolved configuration of the last job of a run directory in its `config.yaml`.

The file is a configuration too. Its first line, a YAML comment, is a checksum of the rest: the report refuses a file
that was edited after the job had written it.
"""

import hashlib
from pathlib import Path

import yaml

from adapt.config.pipeline import Config
from adapt.config.yaml_text import MOST_BYTES, parse_yaml
from adapt.run_dir.files import read_text, write_text
from store.errors import UserError

_NAME = "config.yaml"
_FIRST_LINE = "# checksum of the lines below: "


def write_config(config: Config) -> None:
    """Write a configuration into its run directory, with `${VARIABLE}` as the user wrote it.

    Raises:
        JobError: the file cannot be written.
    """
    text = yaml.safe_dump(config.as_written(), sort_keys=False)
    write_text(config.run_dir / _NAME, f"{_FIRST_LINE}{_checksum(text)}\n{text}")


def read_config(run_dir: Path) -> tuple[str | None, str]:
    """Read the configuration of a run directory.

    Returns:
        Its YAML text (None if there is no file) and its `name`.

    Raises:
        UserError: the file is not as a job has written it.
    """
    path = run_dir / _NAME
    try:
        first, _, text = read_text(path, MOST_BYTES).partition("\n")
        if first != f"{_FIRST_LINE}{_checksum(text)}":
            raise ValueError("its content does not match its checksum")
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    document = parse_yaml(text, str(path))
    return text, str(document.get("name", "")) if isinstance(document, dict) else ""


def configured_methods(run_dir: Path) -> list[str]:
    """Names of the methods of a run directory's configuration, in their order; none if it has no configuration.

    Raises:
        UserError: the file is not as a job has written it.
    """
    text, _ = read_config(run_dir)
    document = parse_yaml(text or "", str(run_dir / _NAME))
    entries = document.get("methods") if isinstance(document, dict) else None
    names = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries or ()]
    return [name for name in names if isinstance(name, str)]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} was damaged, or edited by hand ({reason}): run the job again, which replaces it, or delete it, and "
        "the report shows no configuration"
    )


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
