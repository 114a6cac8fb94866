"""Checks `data.root`, the path of a source's data."""

from pathlib import Path

from extract.config import DataConfig
from store.errors import UserError


def root_folder(config: DataConfig) -> Path:
    """`data.root` as a folder.

    Raises:
        UserError: it is missing, does not exist or is a file.
    """
    root = required_root(config)
    if not root.is_dir():
        raise UserError(f"data.root {root} is a file; source {config.source} requires a folder")
    return root


def root_file(config: DataConfig) -> Path:
    """`data.root` as a file.

    Raises:
        UserError: it is missing, does not exist or is a folder.
    """
    root = required_root(config)
    if root.is_dir():
        raise UserError(f"data.root {root} is a folder; source {config.source} requires the path of the table file")
    return root


def required_root(config: DataConfig) -> Path:
    """`data.root`, a file or a folder.

    Raises:
        UserError: it is missing or does not exist.
    """
    if config.root is None:
        raise UserError(f"source {config.source} requires data.root: the path of the data")
    if not config.root.exists():
        raise UserError(
            f"data.root {config.root} does not exist; check the path (relative paths start at the YAML file's folder)"
        )
    return config.root


def describe_source(config: DataConfig) -> str:
    """The source and its root, for messages."""
    return f"source {config.source}" + ("" if config.root is None else f" at {config.root}")
