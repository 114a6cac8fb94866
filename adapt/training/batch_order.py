"""Draws the batches of an epoch from seed and epoch, so that every run of a seed sees the same batches."""

import numpy as np
from jaxtyping import Int

from store.layout import in_groups

WINDOW = 8  # batches that blocks are shuffled over; all of them are in memory at once

Rows = Int[np.ndarray, "_"]


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int, block: int = 1) -> list[Rows]:
    """Shuffle rows and cut them into batches; every row is in one batch.

    Args:
        rows: rows of the training split.
        batch_size: rows of a batch; the last one may have fewer.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        block: with 1, rows are shuffled one by one. With more, blocks of so many neighboring rows are shuffled, and the
            rows within each window of `WINDOW` batches: a disk or an object store then reads whole blocks.

    Returns:
        the rows of every batch.
    """
    draw = np.random.default_rng([seed, epoch])
    if block == 1:
        return in_groups(draw.permutation(rows), batch_size)
    # cut into blocks, from another start in every epoch: else the same rows would share a block every time
    start = int(draw.integers(block))
    ordered = np.sort(rows)
    blocks = [ordered[:start], *in_groups(ordered[start:], block)]
    # shuffle the blocks, then the rows of each window
    shuffled = np.concatenate([blocks[number] for number in draw.permutation(len(blocks))])
    windows = [draw.permutation(window) for window in in_groups(shuffled, WINDOW * batch_size)]
    return in_groups(np.concatenate(windows), batch_size)
