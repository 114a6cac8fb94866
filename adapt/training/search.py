"""Chooses learning rate, weight decay and options of a method by their validation scores.

A search does not train: it is asked for the trials to train next, and is told their scores. So the searches of several
methods can share one pass over the features.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from adapt.config.search_config import SearchConfig
from adapt.config.trials import MethodConfig, Trial
from adapt.methods.registry import find_method
from adapt.training.scores import Point, Score, SearchScores

_WIDENINGS = 3  # how often a grid is extended where its best point is at an edge


class Search(Protocol):
    """A search for the best trial of one method."""

    def ask(self) -> list[Trial]:
        """The trials to train next: all that were proposed and have no score yet; empty when the search is over."""
        ...

    def tell(self, trials: Sequence[Trial], scores: Sequence[Score]) -> None:
        """Record the scores of some trials that were asked for, in any order, and write them to the file.

        Raises:
            JobError: the file cannot be written.
        """
        ...

    @property
    def best(self) -> Trial:
        """The best trial so far.

        Raises:
            JobError: training diverged at every point.
        """
        ...

    @property
    def points(self) -> list[Point]:
        """All points that have a score."""
        ...


def make_search(method: MethodConfig, search: SearchConfig, scores_file: Path) -> Search:
    """Start the search of a method, or resume it from its file.

    Args:
        method: the method with its trials.
        search: the section `search:`.
        scores_file: file of all scores so far; its name identifies the search.

    Raises:
        JobError: the file is damaged, or belongs to another search.
    """
    full_epochs = 0 if find_method(method.name).solved else search.epochs or method.epochs
    scores = SearchScores(scores_file, method.name, full_epochs)
    if method.space is not None:
        from adapt.training.optuna_search import OptunaSearch  # imports Optuna, which is optional

        return OptunaSearch(method, method.space, search, scores)
    return ListedSearch(method.trials, scores, widenings=_WIDENINGS if search.driver == "grid" else 0)


class ListedSearch:
    """A search over all points of a grid, or over points that were drawn at random.

    If the best trial of a grid has its lowest or highest learning rate or weight decay, the grid is extended beyond
    that edge, and the search goes on.

    Args:
        trials: the points; a single one needs no search.
        scores: the scores so far.
        widenings: how often the points may be extended.
    """

    def __init__(self, trials: Sequence[Trial], scores: SearchScores, widenings: int) -> None:
        self._trials, self._scores, self._widenings = list(trials), scores, widenings

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

    def tell(self, trials: Sequence[Trial], scores: Sequence[Score]) -> None:
        """See `Search.tell`."""
        self._scores.add(trials, scores)

    @property
    def best(self) -> Trial:
        """See `Search.best`."""
        return self._trials[0] if len(self._trials) == 1 else self._scores.best(self._trials)

    @property
    def points(self) -> list[Point]:
        """See `Search.points`."""
        return self._scores.points

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
