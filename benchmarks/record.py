"""What every benchmark's JSON says of the machine and the code that made it."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "timm", "tensorstore", "zarr", "numpy", "av", "decord", "peft", "scikit-learn")


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """`--out`."""
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")


def machine(packages: tuple[str, ...] = _PACKAGES) -> dict[str, Any]:
    """Commit, kind of machine and library versions; nothing that names the machine itself."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version()}
        | {name: found for name in packages if (found := _version(name))},
    }


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures, and keep them in a file where one is given."""
    text = json.dumps(figures, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def _commit() -> str | None:
    """The commit, with `+` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:  # no git
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
