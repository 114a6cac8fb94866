"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): drops the candidates that are worst on validation.

Each rung comes after `factor` times as many epochs as the one before, and one of `factor` candidates goes on. So each
rung costs about the same, and most of the time is spent on few candidates.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from adapt.training.candidate import Candidate


class Rung(NamedTuple):
    """After how many epochs candidates are compared, and which share of those that are compared goes on."""

    epoch: int
    share: Fraction


def rungs(epochs: int, factor: int, min_epochs: int | None) -> list[Rung]:
    """The rungs of a training, ascending; none if it is no longer than `min_epochs`.

    After a third of the epochs, by the best score so far, few of the later winners are dropped; after a tenth many are
    (benchmarks/halving.py).

    Args:
        epochs: of a candidate that is never dropped.
        factor: at least 2.
        min_epochs: epochs before the first rung; None for a third of all.
    """
    found, epoch = [], min_epochs or math.ceil(epochs / 3)
    while epoch < epochs:
        found.append(Rung(epoch, Fraction(1, factor)))
        epoch *= factor
    return found


def drop_worst(candidates: Sequence[Candidate], share: Fraction) -> None:
    """Leave the best share of the active candidates of every contest active, at least one each."""
    contests: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.active:
            contests.setdefault(candidate.contest, []).append(candidate)
    for contest in contests.values():
        n_kept = math.ceil(share * len(contest))
        for candidate in sorted(contest, key=lambda candidate: candidate.rank, reverse=True)[n_kept:]:
            candidate.active, candidate.was_dropped = False, True
