"""Reuses the memory of batches, since allocating the pages of a new array takes longer than filling them."""

import weakref
from collections import deque

import numpy as np
from jaxtyping import UInt8

_MAX_IDLE = 3  # buffers; a reader that is two batches ahead uses three in turn
_MAX_BYTES = 64 * 2**20  # of a buffer that is reused; larger ones are freed at once


class Buffers:
    """Lends arrays; their memory returns to the pool when nothing refers to it anymore."""

    def __init__(self) -> None:
        self._idle: deque[np.ndarray] = deque(maxlen=_MAX_IDLE)

    def lend(self, n_bytes: int) -> UInt8[np.ndarray, "n_bytes"]:
        """An uninitialized array, whose memory is reused only after every view of it, tensors included, is gone."""
        memory = self._find(n_bytes)
        # The base of a numpy view, also of a view of a view, is the first array whose memory comes from elsewhere: this
        # one. So it lives as long as any view of it does.
        lent: np.ndarray = np.frombuffer(memory.data[:n_bytes], np.uint8)
        if memory.nbytes <= _MAX_BYTES:
            weakref.finalize(lent, self._idle.append, memory).atexit = False
        return lent

    def _find(self, n_bytes: int) -> np.ndarray:
        while True:
            try:
                memory = self._idle.popleft()
            except IndexError:  # empty; other threads take buffers too
                return np.empty(n_bytes, np.uint8)
            if n_bytes <= memory.nbytes <= 2 * n_bytes:
                return memory
