"""The order of an epoch's rows: drawn from seed and epoch, so that every run of a seed sees the same batches."""

import numpy as np
from jaxtyping import Int

from store.layout import in_groups

WINDOW = 8  # batches that blocks are mixed over, all of them in memory at once

Rows = Int[np.ndarray, "_"]


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int, block: int = 1) -> list[Rows]:
    """Every row once.

    Args:
        block: 1 draws every row by itself. A larger one keeps that many neighbors in a window of `WINDOW` batches, and
            draws in there anew: a disk or an object store then reads whole blocks.
    """
    draw = np.random.default_rng([seed, epoch])
    if block == 1:
        return in_groups(draw.permutation(rows), batch_size)
    start = int(draw.integers(block))  # or the same rows would be together in every epoch
    ordered = np.sort(rows)
    blocks = [ordered[:start], *in_groups(ordered[start:], block)]
    drawn = np.concatenate([blocks[number] for number in draw.permutation(len(blocks))])
    windows = [draw.permutation(window) for window in in_groups(drawn, WINDOW * batch_size)]
    return in_groups(np.concatenate(windows), batch_size)
