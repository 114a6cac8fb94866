"""Counts the trials of a job and the epochs that they take."""

from collections.abc import Iterator
from dataclasses import dataclass

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig
from adapt.methods.registry import find_method
from adapt.training.halving import Rung, rungs


@dataclass(frozen=True, kw_only=True)
class MethodTrials:
    """The trials of a method: those of its grid that are scored on validation, and one a seed.

    A single point is scored only where the trials of the seeds cannot be, since they train on validation rows too.

    Attributes:
        method: the method.
        points: that are scored, without those by which a search may extend its grid.
        seeds: from which the chosen point is trained.
        point_epochs: epochs of a point.
        share: of these epochs that successive halving leaves, on average over the points.
    """

    method: MethodConfig
    points: int
    seeds: int
    point_epochs: int
    share: float = 1.0

    @property
    def number(self) -> int:
        """All trials."""
        return self.points + self.seeds

    @property
    def in_steps(self) -> bool:
        """Whether it is trained step by step from features."""
        kind = find_method(self.method.name)
        return not kind.solved and not kind.trains_backbone

    @property
    def end_to_end(self) -> bool:
        """Whether it is trained through the backbone."""
        return find_method(self.method.name).trains_backbone

    @property
    def epochs(self) -> float:
        """The epochs of all trials, each alone."""
        return self.share * self.points * self.point_epochs + self.seeds * self.method.epochs


def trials_of(config: Config) -> Iterator[MethodTrials]:
    """The trials of every method of a job."""
    halving = config.train.halving
    for method in config.parsed_methods():
        points = len(method.trials) if len(method.trials) > 1 or config.train.refit else 0
        epochs = config.search.epochs or method.epochs
        drops = rungs(epochs, halving.factor, halving.min_epochs) if halving else []
        yield MethodTrials(
            method=method,
            points=points,
            seeds=len(config.train.seeds),
            point_epochs=epochs,
            share=_share(drops, epochs),
        )


def _share(drops: list[Rung], epochs: int) -> float:
    """The share of all epochs that are trained if candidates are dropped."""
    trained, kept, since = 0.0, 1.0, 0
    for rung in drops:
        trained += kept * (rung.epoch - since)
        kept, since = kept * float(rung.share), rung.epoch
    return (trained + kept * (epochs - since)) / epochs
