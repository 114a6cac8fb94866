"""Memory that is filled again and again: the pages of a new array take longer to get than to fill."""

import weakref
from collections import deque

import numpy as np
from jaxtyping import UInt8

_KEPT = 3  # idle buffers: as many as a reader that is two batches ahead has in turn
_LARGEST_KEPT = 64 * 2**20  # bytes; what is larger goes back to the system at once


class Buffers:
    """Lends arrays; their memory comes back by itself once nothing refers to it any more."""

    def __init__(self) -> None:
        self._idle: deque[np.ndarray] = deque(maxlen=_KEPT)

    def lend(self, n_bytes: int) -> UInt8[np.ndarray, "n_bytes"]:
        """An array of any content, whose memory is lent anew only after every view of it, tensors included, is gone."""
        memory = self._find(n_bytes)
        # numpy lets a view refer past other views to the array that took its memory from elsewhere, and no further:
        # this one. So it lives as long as any view of it does.
        lent: np.ndarray = np.frombuffer(memory.data[:n_bytes], np.uint8)
        if memory.nbytes <= _LARGEST_KEPT:
            weakref.finalize(lent, self._idle.append, memory).atexit = False
        return lent

    def _find(self, n_bytes: int) -> np.ndarray:
        while True:
            try:
                memory = self._idle.popleft()
            except IndexError:  # other threads take from it too
                return np.empty(n_bytes, np.uint8)
            if n_bytes <= memory.nbytes <= 2 * n_bytes:
                return memory
