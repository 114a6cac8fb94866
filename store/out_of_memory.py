"""Memory that runs out, which every library says in its own words."""

import errno

_SIGNS = (
    "out of memory",  # torch, of a GPU
    "can't allocate memory",  # torch, of the main memory
    "Cannot allocate memory",  # the system
    "failed to map segment",  # the system, of a library that is loaded
    "can't start new thread",  # Python; a thread's stack is memory too
    "bad_alloc",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory has run out, and nothing about what was worked on."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError) and any(sign in str(error) for sign in _SIGNS)
