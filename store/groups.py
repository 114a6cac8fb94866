"""Rows taken a group at a time."""

from collections.abc import Sequence
from typing import Any


def in_groups(items: Sequence[Any] | Any, size: int) -> list[Any]:
    """Slices of a sequence or array in order, `size` items each; the last may hold fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]
