"""Chooses how many samples go through the backbone at once."""

from collections.abc import Callable

import torch

# images; larger batches leave a CPU's caches, and fill a GPU no better
_MAX_ON_GPU, _ON_CPU = 512, 16


def choose_batch_size(device: torch.device, run: Callable[[int], object], samples: int, frames: int = 1) -> int:
    """The largest power of two that fits into a GPU's memory, 512 images at most; 16 images on a CPU.

    Args:
        run: puts a batch of the given size through every step of the job. Its result is kept while it runs a second
            time, because two batches are in memory at a time.
        samples: how many there are; the batch is not larger than needed to hold them all.
        frames: of a sample.
    """
    if device.type == "cpu":
        return max(1, _ON_CPU // frames)
    size = min(max(1, _MAX_ON_GPU // frames), 1 << (samples - 1).bit_length())
    while size > 1 and not _fits(run, size):
        torch.cuda.empty_cache()
        size //= 2
    return size


def _fits(run: Callable[[int], object], size: int) -> bool:
    try:
        first = run(size)
        run(size)
    except torch.OutOfMemoryError:
        return False
    del first
    return True
