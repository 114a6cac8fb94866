"""Batches of an epoch: every row once, the same for the same seed; with blocks, neighbors share a window."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adapt.training.batch_order import WINDOW, epoch_batches

ROWS = st.sets(st.integers(0, 2_000), min_size=1, max_size=300).map(lambda rows: np.array(sorted(rows)))
SIZES = st.integers(1, 40)


@given(ROWS, SIZES, SIZES, st.integers(0, 3), st.integers(0, 3))
def test_every_row_comes_once_and_the_seed_decides_when(
    rows: np.ndarray, batch_size: int, block: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(rows, batch_size, seed, epoch, block)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    again = epoch_batches(np.flip(rows) if block > 1 else rows, batch_size, seed, epoch, block)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def orders(block: int) -> dict[tuple[int, int], list[int]]:
    return {
        (seed, epoch): np.concatenate(epoch_batches(np.arange(400), 8, seed, epoch, block)).tolist()
        for seed in range(2)
        for epoch in range(2)
    }


def test_epochs_and_seeds_differ() -> None:
    for block in (1, 16):
        assert len({tuple(order) for order in orders(block).values()}) == 4


def test_a_block_stays_in_one_window_but_for_those_at_its_edges() -> None:
    block, batch_size = 16, 8
    for order in orders(block).values():
        windows = [sorted(order[start : start + WINDOW * batch_size]) for start in range(0, 400, WINDOW * batch_size)]
        pieces = sum(1 + int((np.diff(window) > 1).sum()) for window in windows)
        assert pieces <= 400 // block + 2 + len(windows)  # every window but the last can cut one block in two


def test_blocks_are_cut_elsewhere_in_the_next_epoch() -> None:
    """Neighbors share a window more often than other rows, but not the same ones in every epoch."""
    together = set()
    for epoch in range(12):
        window = np.concatenate(epoch_batches(np.arange(400), 8, 0, epoch, 16)[:WINDOW])
        together |= {row for row in window.tolist() if row + 1 in window}
    assert len({row % 16 for row in together}) == 16
