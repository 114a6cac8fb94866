"""Chooses learning rate, weight decay and options of a method by their validation scores.

A search does not train: it is asked for the trials to train next, and is told their scores. So the searches of several
methods can share one pass over the features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from adapt.config.trials import Trial
from adapt.training.scores import Point, Score, SearchScores


class Search(ABC):
    """A search for the best trial of one method.

    Args:
        scores: the scores so far.
    """

    def __init__(self, scores: SearchScores) -> None:
        self._scores = scores

    @abstractmethod
    def ask(self) -> list[Trial]:
        """The trials to train next: all that were proposed and have no score yet; empty when the search is over."""

    @property
    @abstractmethod
    def best(self) -> Trial:
        """The best trial so far.

        Raises:
            JobError: training diverged at every point.
        """

    def tell(self, trials: Sequence[Trial], scores: Sequence[Score]) -> None:
        """Record the scores of some trials that were asked for, in any order, and write them to the file.

        Raises:
            JobError: the file cannot be written.
        """
        self._scores.add(trials, scores)

    @property
    def points(self) -> list[Point]:
        """All points that have a score."""
        return self._scores.points


class ListedSearch(Search):
    """A search over all points of a grid, or over points that were drawn at random.

    If the best trial of a grid has its lowest or highest learning rate or weight decay, the grid is extended beyond
    that edge, and the search goes on.

    Args:
        trials: the points; a single one needs no search.
        scores: the scores so far.
        widenings: how often the points may be extended.
    """

    def __init__(self, trials: Sequence[Trial], scores: SearchScores, widenings: int) -> None:
        super().__init__(scores)
        self._trials, self._widenings = list(trials), widenings

    def ask(self) -> list[Trial]:
        """See `Search.ask`."""
        if len(self._trials) == 1:
            return []
        while not (pending := [trial for trial in self._trials if trial not in self._scores]):
            more = self._widen()
            if not more:
                return []
            self._trials += more
        return pending

    @property
    def best(self) -> Trial:
        """See `Search.best`."""
        is_unscored = len(self._trials) == 1 and self._trials[0] not in self._scores
        return self._trials[0] if is_unscored else self._scores.best(self._trials)

    def _widen(self) -> list[Trial]:
        """The next trials beyond the edge; none if the best one is inside, or all diverged."""
        best = max(self._trials, key=self._scores.rank)
        if self._widenings == 0 or self._scores.find(best).score == -math.inf:
            return []
        self._widenings -= 1
        return beyond_the_edge(self._trials, best)


def beyond_the_edge(trials: Sequence[Trial], best: Trial) -> list[Trial]:
    """The next trials of a logarithmic grid, on each axis of three or more values where the best one is at an edge."""
    more = []
    for axis in ("lr", "weight_decay"):
        values = sorted({value for trial in trials if (value := getattr(trial, axis))})
        if len(values) < 3 or getattr(best, axis) not in (values[0], values[-1]):
            continue
        edge, inner = (values[0], values[1]) if getattr(best, axis) == values[0] else (values[-1], values[-2])
        more.append(best.model_copy(update={axis: edge * edge / inner}))
    return more
