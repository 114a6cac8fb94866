"""Chooses the device and precision to compute with, configures the process for it, and measures its memory."""

import ctypes
import gc
import time
from contextlib import suppress
from types import TracebackType

import psutil
import torch
from torch import Tensor

from store.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def configure_process() -> None:
    """Set what holds for the whole process: exact float32 convolutions, and malloc thresholds for training steps.

    Every public function that computes calls this first.
    """
    torch.backends.cudnn.allow_tf32 = False  # as by default in torch's matrix products
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed; other C libraries are left alone.

    By default it returns the top of its heap to the kernel after every batch and gets it back, page by page, in the
    next one: up to a third of the time of a training step on a CPU. The peak is the same.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # its maximum


def release_freed_memory() -> None:
    """Give memory that the process has freed back to the kernel, before its use is measured (glibc only)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resolve_device(device: str) -> torch.device:
    """The device to compute on; `auto` is the GPU if there is one, else the CPU.

    Raises:
        UserError: torch cannot compute on that device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if not torch.zeros(1, device=resolved).isfinite():  # the meta device cannot read a value
            raise RuntimeError("it cannot compute")
    except (RuntimeError, AssertionError) as error:
        legal = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise UserError(f"device {device!r} cannot be used here; legal: {legal}") from error
    return resolved


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bfloat16 autocast on a GPU, float32 elsewhere."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a tensor; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for anything but float32."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the seconds that blocks of code take; those on a GPU by events, without waiting for it.

    Args:
        device: where the code computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds, self._events = 0.0, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def __enter__(self) -> None:
        self._started = self._record() if self._on_gpu else time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(self._started, float):
            self._seconds += time.perf_counter() - self._started
        else:
            self._events.append((self._started, self._record()))

    def take(self) -> float:
        """The seconds since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        on_gpu: float = sum(start.elapsed_time(end) for start, end in self._events) / 1000  # from milliseconds
        seconds = self._seconds + on_gpu
        self._seconds, self._events = 0.0, []
        return seconds

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def free_memory_bytes(device: torch.device) -> int:
    """Free memory; on a GPU with what torch's allocator has reserved but not allocated."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unallocated = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unallocated


def bytes_at_once(device: torch.device, of_cpu: int, share_of_gpu: float) -> int:
    """Bytes that one pass may use: a share of a GPU's memory, or a fixed number on a CPU, to stay in its caches."""
    if device.type != "cuda":
        return of_cpu
    return int(share_of_gpu * torch.cuda.get_device_properties(device).total_memory)
