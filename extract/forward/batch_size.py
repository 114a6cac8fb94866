"""How many samples go through the backbone at once."""

from collections.abc import Callable

import torch

_LARGEST, _ON_CPU = 512, 16  # images; more only leave a CPU's caches, and no longer fill a GPU better


def choose_batch_size(device: torch.device, run: Callable[[int], object], samples: int, frames: int = 1) -> int:
    """The largest power of two that a GPU has the memory for, 512 images at most; 16 images on a CPU.

    Args:
        run: takes that many samples through all that a batch goes through; what it returns is held while it runs anew,
            as two batches are under way at a time.
        samples: how many there are: a batch that holds them all is large enough.
        frames: of a sample.
    """
    if device.type == "cpu":
        return max(1, _ON_CPU // frames)
    size = min(max(1, _LARGEST // frames), 1 << (samples - 1).bit_length())
    while size > 1 and not _fits(run, size):
        torch.cuda.empty_cache()
        size //= 2
    return size


def _fits(run: Callable[[int], object], size: int) -> bool:
    try:
        held = run(size)
        run(size)
    except torch.OutOfMemoryError:
        return False
    del held
    return True
