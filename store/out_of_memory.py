"""Recognizes errors that mean that memory ran out, which every library reports in another way."""

import errno

_MESSAGES = (
    "out of memory",  # torch, for a GPU
    "can't allocate memory",  # torch, for main memory
    "Cannot allocate memory",  # the system
    "failed to map segment",  # the system, as it loads a library
    "can't start new thread",  # Python, for a thread's stack
    "bad_alloc",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, as opposed to a fault of the input."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError) and any(message in str(error) for message in _MESSAGES)
