"""Settings of the whole process: freed memory is kept, float32 is exact on a GPU, and every public door sets them."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sidecache as sc
from adapt.config.pipeline import Config
from extract.forward.device import configure_process
from extract.job.task_plugin import run_on_worker
from sidecache.command_line import _repair, app

PAGES = 64 * 2**20 // 4096
TAKE_AND_FREE = """
import ctypes, resource
from extract.forward.device import configure_process

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def take_and_free():
    blocks = [libc.malloc(2**20) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    for block in blocks:
        libc.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{call}
for _ in range(3):
    take_and_free()
before = faults()
take_and_free()
print(faults() - before)
"""


def page_faults(call: str) -> int:
    """Of one more round, when memory of the same size was freed before."""
    command = [sys.executable, "-c", TAKE_AND_FREE.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_returned_to_the_kernel() -> None:
    assert page_faults("") > 0.5 * PAGES
    assert page_faults("configure_process()") < 0.05 * PAGES


def test_convolutions_do_not_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    configure_process()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


class CalledError(Exception):
    """`configure_process` was called."""


def command(*words: str) -> Callable[[Config, Path], None]:
    def run(config: Config, job: Path) -> None:
        app([*words, str(job)], standalone_mode=False)

    return run


DOORS: dict[str, Callable[[Config, Path], Any]] = {
    "sc.extract": lambda config, _: sc.extract(config),
    "sc.train": lambda config, _: sc.train(config),
    "sc.run": lambda config, _: sc.run(config),
    "sc.load_adaptor": lambda _, job: sc.load_adaptor(job),
    "sidecache extract": command("extract"),
    "sidecache train": command("train"),
    "sidecache run": command("run"),
    "sidecache plan": command("plan"),
    "sidecache intrinsic": command("intrinsic"),
    "sidecache predict": lambda _, job: app(["predict", str(job), str(job)], standalone_mode=False),
    "sidecache verify --repair": lambda config, _: _repair(config.store.path, config, None),  # type: ignore[arg-type]
    "a task of a dask worker": lambda *_: run_on_worker("sidecache-0", 0, b""),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_configures_the_process_first(
    door: str, tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure() -> None:
        raise CalledError

    # the module that defines it comes last: one that is imported here for the first time must not keep the patched one
    users = (
        "extract.job.task_plugin",
        "adapt.adaptors.files",
        "sidecache.commands",
        "sidecache.predicting",
        "sidecache.studies",
    )
    for module in (*users, "extract.forward.device"):
        monkeypatch.setattr(f"{module}.configure_process", configure)
    (tmp_path / "job.yaml").write_text("backbone: {name: vit_tiny_patch16_224, weights: random}")
    with pytest.raises(CalledError):
        DOORS[door](tiny_config(), tmp_path / "job.yaml")
