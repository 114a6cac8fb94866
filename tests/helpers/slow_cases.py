"""Marks cases of a long test as slow, so that the fast tests keep one of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def all_but_first_slow(cases: Iterable[Any], unpack: bool = False) -> list[Any]:
    """The cases of a parametrized test.

    Args:
        cases: one value a case.
        unpack: whether a value is a tuple of several arguments.
    """
    first, *others = (pytest.param(*case) if unpack else pytest.param(case) for case in cases)
    return [first, *(pytest.param(*case.values, marks=pytest.mark.slow) for case in others)]
