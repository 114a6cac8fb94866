"""The rungs of successive halving."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.training.halving import rungs

EPOCHS, FACTOR, FIRST = st.integers(1, 2000), st.integers(2, 10), st.integers(1, 50)


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [((27, 3, 1), [1, 3, 9]), ((30, 3, 1), [1, 3, 9, 27]), ((8, 2, 2), [2, 4]), ((5, 3, 5), []), ((1, 2, 1), [])],
)
def test_rungs_are_as_in_the_paper(arguments: tuple[int, int, int], epochs: list[int]) -> None:
    assert [rung.epoch for rung in rungs(*arguments)] == epochs


@given(EPOCHS, FACTOR, FIRST)
def test_rungs_grow_by_the_factor_from_the_first_to_the_last_that_fits(epochs: int, factor: int, first: int) -> None:
    found = [rung.epoch for rung in rungs(epochs, factor, first)]
    assert found[:1] == ([first] if first < epochs else [])
    assert all(later == factor * earlier for earlier, later in itertools.pairwise(found))
    assert all(epoch < epochs for epoch in found)
    assert not found or found[-1] * factor >= epochs


@given(EPOCHS, FACTOR, FIRST)
def test_a_candidate_costs_at_most_as_many_epochs_as_a_rung_allows(epochs: int, factor: int, first: int) -> None:
    share, cost, start = Fraction(1), Fraction(0), 0
    found = rungs(epochs, factor, first)
    for rung in found:
        assert rung.share == Fraction(1, factor)
        cost += share * (rung.epoch - start)
        share, start = share * rung.share, rung.epoch
    cost += share * (epochs - start)
    assert cost <= min(epochs, first * (1 + len(found)))
