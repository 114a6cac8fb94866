"""The class of a fault that `benchmarks.sabotage` makes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sabotage:
    """A replacement in one file, and tests of which at least one must fail.

    Args:
        old: the text to replace, which the file contains exactly once.
        tests: test files or tests, as arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
