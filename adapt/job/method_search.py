"""Searches the best trial of one method with the first seed, and gives the trials that are then trained."""

from collections.abc import Sequence
from typing import Any

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig, Trial
from adapt.job.feature_set import FeatureSet, Log
from adapt.job.trial_run import TrialSpec, settings_of
from adapt.methods.registry import find_method
from adapt.report.fingerprint import digest
from adapt.report.seed_averages import differing
from adapt.training.make_search import make_search
from adapt.training.row_draw import RowDraw
from adapt.training.scores import Point, Score
from adapt.training.version import TRAINING_VERSION


class MethodSearch:
    """The search of one method; its scores are kept in the run directory.

    Args:
        config: the configuration.
        features: its features.
        method: the method.

    Raises:
        JobError: the file of scores is damaged.
    """

    def __init__(self, config: Config, features: FeatureSet, method: MethodConfig) -> None:
        self._config, self._method = config, method
        kind = features.kind(find_method(method.name).trains_backbone)
        settings = settings_of(config, method, for_search=True)
        drawn, seed = RowDraw.of(config, for_search=True), config.train.seeds[0]
        determining = (features.provenance, kind, method, config.search, settings, drawn, seed)
        search_id = digest(*determining, TRAINING_VERSION)
        self._search = make_search(method, config.search, config.run_dir / "search" / f"{method.name}-{search_id}.json")

    def ask(self) -> list[TrialSpec]:
        """The trials to train next; none when the search is over."""
        trials = self._search.ask()
        if not trials and self._config.train.refit and not self._search.points:
            trials = [self._search.best]  # the only one: it is scored before it is trained on validation rows too
        return [TrialSpec(method=self._method, trial=trial, seed=self._config.train.seeds[0]) for trial in trials]

    def tell(self, specs: list[TrialSpec], scores: list[Score]) -> None:
        """Record the scores of trials that were asked for."""
        self._search.tell([spec.trial for spec in specs], scores)

    def chosen(self, log: Log) -> list[TrialSpec]:
        """The best trial, to be trained from every seed.

        Raises:
            JobError: training diverged at every point.
        """
        best, points = self._search.best, self._search.points
        if len(points) > 1:
            log(f"{self._method.name}: chose {_describe_choice(best, points)} among {len(points)} on validation")
        chosen_by = next((point.score for point in points if point.key == best.key), None)
        return [
            TrialSpec(method=self._method, trial=best, seed=seed, chosen_by=chosen_by)
            for seed in self._config.train.seeds
        ]


def _describe_choice(best: Trial, points: Sequence[Point]) -> str:
    """The hyperparameters in which the points of a search differ, and their values."""

    def values(point: Point | Trial) -> dict[str, Any]:
        options = point.options if isinstance(point.options, dict) else point.options.model_dump(mode="json")
        return {"lr": point.lr, "weight_decay": point.weight_decay} | options

    names = differing([values(point) for point in points])
    chosen = {name: value for name, value in values(best).items() if name in names}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in chosen.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def describe(trial: Trial) -> str:
    """The hyperparameters of a trial as text."""
    options = ", ".join(f"{name}={value}" for name, value in trial.options.model_dump(mode="json").items())
    rate = "" if trial.lr is None else f"lr={trial.lr:g}, "
    return f"{rate}weight_decay={trial.weight_decay:g}, {options}"
