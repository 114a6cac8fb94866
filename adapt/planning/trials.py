"""Counts the trials of a job and the epochs that they take, so that the plan can tell the time of all training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapt.config.pipeline import Config
from adapt.methods.registry import find_method


@dataclass(frozen=True, kw_only=True)
class MethodTrials:
    """The trials of a method: those of its grid that are scored on validation, and one a seed.

    A single point is scored only where the trials of the seeds cannot be, since they train on validation rows too.

    Attributes:
        number: of trials, without those by which a search may extend its grid.
        epochs: of all trials; 0 for a method that is solved instead of trained step by step.
        end_to_end: whether an epoch is one through the backbone.
    """

    number: int
    epochs: int
    end_to_end: bool


def trials_of(config: Config) -> Iterator[MethodTrials]:
    """The trials of every method of a job."""
    n_seeds, search_epochs = len(config.train.seeds), config.search.epochs
    for method in config.parsed_methods():
        n_points = len(method.trials) if len(method.trials) > 1 or config.train.refit else 0
        epochs = n_points * (search_epochs or method.epochs) + n_seeds * method.epochs
        kind = find_method(method.name)
        yield MethodTrials(
            number=n_points + n_seeds, epochs=0 if kind.solved else epochs, end_to_end=kind.trains_backbone
        )


def training_seconds(config: Config, epoch_seconds: Mapping[str, float | None], source: str) -> float | None:
    """Seconds of all trials, each trained alone; None if the time of an epoch that is needed is unknown.

    Args:
        epoch_seconds: by feature source and for `end_to_end`.
        source: the feature source of the job.
    """
    total = 0.0
    for trials in trials_of(config):
        seconds = epoch_seconds.get("end_to_end" if trials.end_to_end else source)
        if trials.epochs and seconds is None:
            return None
        total += trials.epochs * (seconds or 0.0)
    return total
