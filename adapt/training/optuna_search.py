"""Searches with Optuna, which proposes points in batches by its tree-structured Parzen estimator.

The first batch is drawn at random. Nothing of Optuna's is stored: with the same seed and the same scores it proposes
the same points again, so an interrupted search is repeated up to where it was, with the scores of its file.
"""

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from adapt.config.search_config import SearchConfig
from adapt.config.search_space import Choice, IntUniform, LogUniform, Range
from adapt.config.trials import MethodConfig, Space, Trial
from adapt.training.scores import SearchScores
from adapt.training.search import Search


class OptunaSearch(Search):
    """A search in which Optuna proposes the points.

    Args:
        method: the method; as many points are proposed as it has trials.
        space: what points are proposed from.
        search: the seed and the size of a batch.
        scores: the scores so far.
    """

    def __init__(self, method: MethodConfig, space: Space, search: SearchConfig, scores: SearchScores) -> None:
        super().__init__(scores)
        self._space, self._batch_size = space, search.batch
        self._n_left = len(method.trials)
        self._trials: list[Trial] = []
        self._batch: list[tuple[optuna.Trial, Trial]] = []  # not told to the study yet
        self._distributions = {key: _distribution(axis) for key, axis in space.axes.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs that a study was made
        # constant_liar: the points of a batch are spread
        sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=search.batch, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        for point in space.draw(self._n_left, search.seed)[: search.batch]:
            self._study.enqueue_trial(point)

    def ask(self) -> list[Trial]:
        """See `Search.ask`; the points of a batch, or those of them that have no score yet."""
        while not (pending := self._pending()):
            self._tell_study()
            if self._n_left == 0:
                return []
            self._propose(min(self._batch_size, self._n_left))
        return pending

    @property
    def best(self) -> Trial:
        """See `Search.best`."""
        return self._scores.best(self._trials)

    def _pending(self) -> list[Trial]:
        """The trials of the batch that have no score, each once: Optuna may propose a point again."""
        return list({trial.key: trial for _, trial in self._batch if trial not in self._scores}.values())

    def _propose(self, n_points: int) -> None:
        for _ in range(n_points):
            proposed = self._study.ask(self._distributions)
            self._batch.append((proposed, self._space.trial(proposed.params)))
        self._trials += [trial for _, trial in self._batch]
        self._n_left -= n_points

    def _tell_study(self) -> None:
        """Tell the study the scores of the batch; Optuna ranks pruned trials below all others, by their epochs."""
        for proposed, trial in self._batch:
            point = self._scores.find(trial)
            if self._scores.was_dropped(trial):
                proposed.report(point.score, step=point.epochs)
                self._study.tell(proposed, state=TrialState.PRUNED)
            else:
                self._study.tell(proposed, point.score)
        self._batch = []


def _distribution(axis: Range) -> BaseDistribution:
    """Optuna's distribution of the coordinates of an axis."""
    if isinstance(axis, Choice):
        return CategoricalDistribution(axis.ends)
    if isinstance(axis, IntUniform):
        return IntDistribution(*axis.int_uniform)
    if isinstance(axis, LogUniform):
        return FloatDistribution(*axis.log_uniform, log=True)
    return FloatDistribution(*axis.uniform)
