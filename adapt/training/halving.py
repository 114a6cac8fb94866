"""The rungs of successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

Each rung comes after `factor` times as many epochs as the one before, and one of `factor` candidates goes on. So each
candidate costs the same at any rung, and most of the time is spent on few candidates.
"""

from fractions import Fraction
from typing import NamedTuple


class Rung(NamedTuple):
    """After how many epochs candidates are compared, and which share of those that are compared goes on."""

    epoch: int
    share: Fraction


def rungs(epochs: int, factor: int, min_epochs: int) -> list[Rung]:
    """The rungs of a training, ascending; none if it is no longer than `min_epochs`.

    Args:
        epochs: of a candidate that is never dropped.
        factor: at least 2.
        min_epochs: epochs before the first rung.
    """
    found, epoch = [], min_epochs
    while epoch < epochs:
        found.append(Rung(epoch, Fraction(1, factor)))
        epoch *= factor
    return found
