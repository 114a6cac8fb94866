"""Batches of an epoch: every row once, the same for every seed; with blocks, neighbors share a window."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapt.training.batch_order import WINDOW, epoch_batches
from adapt.training.row_draw import RowDraw, draw_rows

N_ROWS, SIZES = st.integers(1, 300), st.integers(1, 40)


@given(N_ROWS, SIZES, SIZES, st.integers(0, 3))
def test_every_row_comes_once_and_the_epoch_decides_when(n_rows: int, n_batches: int, block: int, epoch: int) -> None:
    batches = epoch_batches(n_rows, n_batches, epoch, block)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n_rows))
    again = epoch_batches(n_rows, n_batches, epoch, block)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


@given(N_ROWS, SIZES, SIZES, st.integers(0, 3))
def test_there_are_as_many_batches_as_wanted_and_no_two_differ_by_more_than_a_row(
    n_rows: int, n_batches: int, block: int, epoch: int
) -> None:
    sizes = [len(rows) for rows in epoch_batches(n_rows, n_batches, epoch, block)]
    assert len(sizes) == n_batches
    assert max(sizes) - min(sizes) <= 1


def orders(block: int) -> list[list[int]]:
    return [np.concatenate(epoch_batches(400, 50, epoch, block)).tolist() for epoch in range(4)]


def test_epochs_differ() -> None:
    for block in (1, 16):
        assert len({tuple(order) for order in orders(block)}) == 4


@pytest.mark.parametrize("number", range(4))
def test_no_batch_is_drawn_as_the_validation_rows_are(number: int) -> None:
    """Of an epoch and a seed with the same number; a batch of validation rows would train nothing."""
    labels = torch.ones(400, 3, dtype=torch.uint8)  # multi-label: drawn from all rows at once
    rows, _ = draw_rows(labels, RowDraw(val_fraction=0.25), seed=number)
    n_trained = [len(np.intersect1d(batch, rows)) for batch in epoch_batches(400, 10, number)]
    assert min(n_trained) > 15  # of 40, where 30 are expected
    assert max(n_trained) < 40


def test_a_block_stays_in_one_window_but_for_those_at_its_edges() -> None:
    block, batch_size = 16, 8
    for order in orders(block):
        windows = [sorted(order[start : start + WINDOW * batch_size]) for start in range(0, 400, WINDOW * batch_size)]
        pieces = sum(1 + int((np.diff(window) > 1).sum()) for window in windows)
        assert pieces <= 400 // block + 2 + len(windows)  # every window but the last can cut one block in two


def test_blocks_are_cut_elsewhere_in_the_next_epoch() -> None:
    """Neighbors share a window more often than other rows, but not the same ones in every epoch."""
    together = set()
    for epoch in range(12):
        window = np.concatenate(epoch_batches(400, 50, epoch, 16)[:WINDOW])
        together |= {row for row in window.tolist() if row + 1 in window}
    assert len({row % 16 for row in together}) == 16
