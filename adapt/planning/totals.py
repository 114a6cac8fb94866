"""Predicts the seconds of a whole job by feature source: extraction, training, validation and test.

All trials from features share the reads of two passes, that of the searches and that of the chosen points from all
seeds. The pooled values of read-outs take one more read of the training split, and the test split is read once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapt.job.trial_count import MethodTrials, trials_of
from adapt.planning.job_facts import JobFacts
from adapt.planning.speeds import Speeds

_EVALUATION = 1 / 3  # of the time of a step: a forward pass without the backward pass, which takes twice as long


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Trials of a method in a pass.

    Attributes:
        epochs: of each trial.
        rows: that are trained on and validated on.
        seconds: of an epoch of all its trials, a sample, reading aside.
    """

    epochs: int
    rows: tuple[int, int]
    seconds: float

    @property
    def computing(self) -> float:
        """Seconds of its steps and validations."""
        return self.epochs * self.seconds * (self.rows[0] + _EVALUATION * self.rows[1])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Seconds a row that a feature source adds to training.

    Args:
        epoch: reading a row in an epoch of training.
        once: reading it outside of training: pooled values, the test split.
        unstored: computing a row of a split that is not stored, which is read once too.
        first: what every row of the training samples, in all their views, takes before the first epoch.
    """

    epoch: float
    once: float
    unstored: float
    first: float = 0.0


def training_seconds(
    job: JobFacts, speeds: Speeds, readings: Mapping[str, Reading], end_to_end_epoch: float | None
) -> dict[str, float | None]:
    """Seconds of training and testing by feature source; None if the samples are unknown.

    Args:
        job: the job.
        speeds: its speeds.
        readings: what each feature source adds.
        end_to_end_epoch: seconds of an epoch through the backbone.
    """
    search, final = job.drawn_rows(for_search=True), job.drawn_rows(for_search=False)
    if job.rows is None or search is None or final is None:
        return dict.fromkeys(readings)
    trials = list(trials_of(job.config))
    through_backbone = sum(one.epochs * (end_to_end_epoch or 0.0) for one in trials if one.end_to_end)
    searches, finals = list(_searches(trials, speeds, search)), list(_finals(trials, speeds, final))
    computing = sum(one.computing for one in (*searches, *finals))
    unstored = sum((job.unstored_rows or {}).values())
    computing += _EVALUATION * (job.rows.get("test", 0) + unstored) * sum(one.seconds for one in finals)
    epochs_read = _rows_read(searches) + _rows_read(finals)
    once = job.rows["train"] + job.rows.get("test", 0)
    from_features = any(not one.end_to_end for one in trials)
    return {
        source: through_backbone
        + computing
        + from_features * (epochs_read * reading.epoch + once * reading.once + job.training_rows * reading.first)
        + from_features * unstored * reading.unstored
        for source, reading in readings.items()
    }


def _searches(trials: list[MethodTrials], speeds: Speeds, rows: tuple[int, int]) -> Iterator[_Pass]:
    in_steps = [one for one in trials if one.in_steps]
    for one, seconds in zip(in_steps, speeds.trials, strict=True):
        if one.points:
            yield _Pass(epochs=one.point_epochs, rows=rows, seconds=one.share * seconds.points)


def _finals(trials: list[MethodTrials], speeds: Speeds, rows: tuple[int, int]) -> Iterator[_Pass]:
    in_steps = [one for one in trials if one.in_steps]
    for one, seconds in zip(in_steps, speeds.trials, strict=True):
        yield _Pass(epochs=one.method.epochs, rows=rows, seconds=seconds.seeds)


def _rows_read(passes: list[_Pass]) -> int:
    """Rows that are read for trials which share each read if their epochs are equal."""
    return sum(epochs * sum(passes[0].rows) for epochs in {one.epochs for one in passes})
