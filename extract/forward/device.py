"""Devices: which one computes and in what precision, moving tensors there, and how much memory it has."""

import ctypes
from contextlib import suppress

import psutil
import torch
from torch import Tensor

from store.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one, whose convolutions are then as exact in float32 as its matrix products."""
    torch.backends.cudnn.allow_tf32 = False
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if not torch.zeros(1, device=resolved).isfinite():  # reading the value back is what the meta device cannot do
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
    """To a GPU by way of pinned memory, so that the host does not wait for the copy."""
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


def free_memory_bytes(device: torch.device) -> int:
    """What nobody uses, with what torch keeps of a GPU's memory for itself and has not given out."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def bytes_at_once(device: torch.device, of_cpu: int, share_of_gpu: float) -> int:
    """What a pass may hold: on a GPU a share of all its memory, on a CPU so many bytes, whose caches are as small."""
    if device.type != "cuda":
        return of_cpu
    return int(share_of_gpu * torch.cuda.get_device_properties(device).total_memory)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, from now on; other C libraries go on as they are.

    By default it hands the top of its heap back to the kernel after every batch and gets it again, page by page, in the
    next one: up to a third of the time of a training step on a CPU. The peak is the same.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)  # the highest it takes
