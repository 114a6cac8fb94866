"""Draws the batches of an epoch, the same for every seed, so that all seeds and candidates share each read.

A batch is drawn from all rows of the training split. Each seed trains on those of its rows that are its training rows,
so the number of rows of a step varies a little around `batch_size`.
"""

import math

import numpy as np
from jaxtyping import Int

from store.layout import in_groups

WINDOW = 8  # batches that blocks are shuffled over; all of them are in memory at once
_ORDER = 1  # else an epoch and a seed of the same number would draw the same: batches of validation rows only

Rows = Int[np.ndarray, "_"]


def epoch_batches(n_rows: int, n_batches: int, epoch: int, block: int = 1) -> list[Rows]:
    """Shuffle the rows of the training split and cut them into batches of equal size, give or take a row.

    Args:
        n_rows: rows of the training split.
        n_batches: batches of the epoch; with more than there are rows, some are empty.
        epoch: number of the epoch, from 0.
        block: with 1, rows are shuffled one by one. With more, blocks of so many neighboring rows are shuffled, and the
            rows within each window of `WINDOW` batches: a disk or an object store then reads whole blocks.

    Returns:
        the rows of every batch.
    """
    draw = np.random.default_rng([epoch, _ORDER])
    if block == 1:
        return np.array_split(draw.permutation(n_rows), n_batches)
    # cut into blocks, from another start in every epoch: else the same rows would share a block every time
    start, ordered = int(draw.integers(block)), np.arange(n_rows)
    blocks = [ordered[:start], *in_groups(ordered[start:], block)]
    # shuffle the blocks, then the rows of each window
    shuffled = np.concatenate([blocks[number] for number in draw.permutation(len(blocks))])
    window = WINDOW * math.ceil(n_rows / n_batches)
    return np.array_split(np.concatenate([draw.permutation(rows) for rows in in_groups(shuffled, window)]), n_batches)
