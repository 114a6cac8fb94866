"""Callbacks that follow a training: what they are called with, and when."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from adapt.run_dir.results import Row

Phase = Literal["search", "final"]


@dataclass(frozen=True, kw_only=True)
class EpochEvent:
    """One epoch of one trial.

    Args:
        method: name of the method.
        options: its options, as JSON values.
        lr: peak learning rate of the trial; None for a method that is solved.
        last_lr: learning rate after the last step of the epoch; None for a method that is solved.
        weight_decay: of the trial.
        seed: of the training.
        epoch: number of the epoch, from 1 on.
        train_loss: mean over the batches of the epoch.
        val_score: on the validation rows, in percent.
        val_loss: on the validation rows.
        phase: search, or final for the training of the trial that was chosen.
    """

    method: str
    options: dict[str, Any]
    lr: float | None
    last_lr: float | None
    weight_decay: float
    seed: int
    epoch: int
    train_loss: float
    val_score: float
    val_loss: float
    phase: Phase


@runtime_checkable
class Callback(Protocol):
    """Follows a training; it changes nothing, and its errors stop the job."""

    def on_epoch(self, event: EpochEvent) -> None:
        """Called after the validation of each epoch, for each trial that is trained."""
        ...

    def on_trial(self, row: Row) -> None:
        """Called for each trial that was trained to the end and tested, after its row is written."""
        ...
