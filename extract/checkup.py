"""Looks at what jobs need of a machine, and says what to do where something is missing."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from PIL import features
from rich.filesize import decimal

from extract.backbones.hub_connection import hub_host, obstacle_to_hub

_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED = 10 * 10**9, 8 * 10**9, 10**9
_LEAST_FILES = 1024  # a store opens a file a layer and shard, at most a part of the limit
_PACKAGES = ("torch", "torchvision", "timm", "zarr", "tensorstore", "dask")
_OPTIONAL = {
    "av": "pip install 'sidecache[video]' to read videos",
    "transformers": "pip install 'sidecache[video]' for ViViT",
    "pillow-heif": "pip install 'sidecache[heif]' to read .heic files",
    "optuna": "pip install 'sidecache[optuna]' to search with it",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one thing.

    Args:
        name: of the thing.
        found: its state.
        ok: whether nothing needs to be done.
        remedy: what to do, if anything.
    """

    name: str
    found: str
    ok: bool = True
    remedy: str = ""


def check_machine() -> list[Finding]:
    """All findings; nothing is changed."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _devices, _disks, _memory, _limits, _codecs, _hub)
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding(name="python", found=f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding(name="packages", found=", ".join(f"{name} {version(name)}" for name in _PACKAGES))


def _devices() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    yield Finding(name="cores", found=f"{cores}, of which torch uses {torch.get_num_threads()}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        remedy = "large backbones take long on cores; install a build of torch for your GPU if there is one"
        yield Finding(name="GPU", found=f"none; {built}", ok=False, remedy=remedy)
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding(name=f"GPU {number}", found=f"{properties.name}, {decimal(properties.total_memory)}")


def _disks() -> Iterator[Finding]:
    disks = (
        ("disk of this folder", Path.cwd(), "keep stores elsewhere: store.path (the plan tells their size)"),
        ("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder on a larger disk"),
    )
    for name, folder, remedy in disks:
        usage = shutil.disk_usage(folder)
        ok = usage.free >= _LEAST_DISK
        found = f"{decimal(usage.free)} free of {decimal(usage.total)}"
        yield Finding(name=name, found=found, ok=ok, remedy="" if ok else remedy)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    ok = memory.available >= _LEAST_MEMORY
    found = f"{decimal(memory.available)} available of {decimal(memory.total)}"
    remedy = "" if ok else "train.feature_source: streamed keeps no features in memory"
    yield Finding(name="memory", found=found, ok=ok, remedy=remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        remedy = "" if free >= _LEAST_SHARED else "a DataLoader's workers need it: start a container with --shm-size=8g"
        yield Finding(name="shared memory", found=f"{decimal(free)} free", ok=not remedy, remedy=remedy)


def _limits() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES
    remedy = "" if ok else f"raise it to {_LEAST_FILES} or more: ulimit -n {_LEAST_FILES}"
    yield Finding(name="open files", found=f"at most {soft:,} (hard limit {hard:,})", ok=ok, remedy=remedy)


def _codecs() -> Iterator[Finding]:
    pillow = [codec for codec in ("jpg", "webp", "avif") if features.check(codec)]
    yield Finding(name="image codecs", found=", ".join(["simplejpeg", *(f"pillow {codec}" for codec in pillow)]))
    for package, remedy in _OPTIONAL.items():
        try:
            yield Finding(name=package, found=version(package))
        except PackageNotFoundError:
            yield Finding(name=package, found="not installed", ok=False, remedy=remedy)


def _hub() -> Iterator[Finding]:
    cache = Path(constants.HF_HUB_CACHE)
    cached = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    yield Finding(name="hub cache", found=f"{cached} models in {cache}")
    obstacle = obstacle_to_hub()
    remedy = "give backbone.weights a file or folder; where a proxy is needed, set HTTPS_PROXY" if obstacle else ""
    found = obstacle or f"{hub_host()} can be reached"
    yield Finding(name="model hub", found=found, ok=not obstacle, remedy=remedy)
