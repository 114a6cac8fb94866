"""What a trial costs: peak memory, and when the cache has paid for itself."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest memory in use while a block ran, in bytes; None where the system does not tell."""

    n_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure a block: allocations on a GPU, else the whole process's resident memory (Linux)."""
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _RESET.write_text("5")  # the kernel then restarts its high-water mark
    yield peak
    peak.n_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_mark()


def _high_water_mark() -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def break_even_epochs(
    extract_seconds: float, forward_seconds: float, samples_extracted: int, samples_per_epoch: int
) -> float | None:
    """Epochs of training after which extracting once has cost less than a forward pass in every epoch.

    Args:
        extract_seconds: what extraction took in all, encoding and writing included.
        forward_seconds: what reading the samples and the forward pass took of it: online training pays that again in
            every epoch, for the samples of an epoch.
    """
    if not forward_seconds or not samples_extracted:
        return None
    return extract_seconds / (forward_seconds / samples_extracted * samples_per_epoch)
