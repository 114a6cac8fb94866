"""The C library's heap in extraction and training: what one batch frees stays with the process for the next."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, from now on; other C libraries go on as they are.

    By default it hands the top of its heap back to the kernel after every batch and gets it again, page by page, in the
    next one: up to a third of the time of a training step on a CPU. The peak is the same.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)  # the highest it takes
