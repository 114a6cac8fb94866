"""Which of the stored layers a method reads by its option `layers`."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_cases import make_spec

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.options import choose_layers
from store.errors import UserError

STORED = (1, 3, 5, 7, 9, 11)  # every second of twelve blocks


def of(stored: tuple[int, ...]) -> FeatureSpec:
    return replace(make_spec(), layers=stored, depth=max(stored) + 1)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((11,), (11,)),
        ((2, 5, 8, 11), (2, 5, 8, 11)),
        (STORED, (3, 7, 11)),
        (tuple(range(12)), (2, 5, 8, 11)),
        (tuple(range(24)), (5, 11, 17, 23)),
        (tuple(range(40)), (9, 19, 29, 39)),
    ],
)
def test_a_side_network_reads_four_layers_at_most(stored: tuple[int, ...], read: tuple[int, ...]) -> None:
    assert choose_layers("auto", of(stored)) == read


@given(st.sets(st.integers(0, 50), min_size=1))
def test_automatic_layers_are_evenly_spread_up_to_the_last(stored: set[int]) -> None:
    ordered = tuple(sorted(stored))
    read = choose_layers("auto", of(ordered))
    assert read[-1] == ordered[-1]
    places = [ordered.index(layer) for layer in read]
    assert len({after - before for before, after in pairwise(places)}) <= 1
    assert min(3, len(ordered)) <= len(read) <= 4


def test_a_layer_that_is_not_stored_is_refused() -> None:
    with pytest.raises(UserError, match=r"layers \[2\] are not in the features, which hold \[1, 3, 5, 7, 9, 11\]"):
        choose_layers([2, 3], of(STORED))
