"""Writes the figures of a benchmark as JSON, with the machine and the code that they come from."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapt.job.this_job import processor

_PACKAGES = ("torch", "timm", "tensorstore", "zarr", "numpy", "av", "decord", "peft", "scikit-learn")


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Add `--out` to a parser."""
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")


def machine(packages: tuple[str, ...] = _PACKAGES) -> dict[str, Any]:
    """Commit, processor and library versions; nothing that identifies the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version()}
        | {name: found for name in packages if (found := _version(name))},
    }


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures, and write them to a file if one is given."""
    text = json.dumps(figures, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def _commit() -> str | None:
    """The commit, with `+` if files were changed since; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
