"""Describes the job that is running: its time, command, machine and versions."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from adapt.run_dir.job_record import JobRecord
from extract.forward.device import resolve_device

_PACKAGES = ("sidecache", "torch", "timm", "numpy")  # those that decide results
_CPU_INFO = Path("/proc/cpuinfo")


def this_job(device: str) -> JobRecord:
    """The record of this job.

    Args:
        device: `train.device` of its configuration.
    """
    where = resolve_device(device)
    return JobRecord(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        command=command(sys.argv),
        processor=processor(),
        cores=_cores(),
        gpu=torch.cuda.get_device_name(where) if where.type == "cuda" else None,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    )


def command(arguments: list[str]) -> str:
    """A command line that can be given again: the installed command by its name, scripts and modules after `python`."""
    program = Path(arguments[0])
    if program.name == "__main__.py":
        start = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        start = ["python", str(program)]
    else:
        start = [program.name]
    return shlex.join([*start, *arguments[1:]])


def processor() -> str:
    """The name of the processor, or its kind where the system does not tell."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder of source files
        return "unknown"
