"""Saves the state of a training run to a file, so that an interrupted run resumes and gives the same result."""

import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapt.training.stacks import TrainState
from store.errors import JobError
from store.local.durable_files import replacing
from store.out_of_memory import is_shortage

_SAVE_EVERY_SECONDS = 5.0  # of work that an interruption may lose
_SHARE_OF_TIME = 1 / 20  # that saving may take; large models are saved less often
_CANDIDATE_FIELDS = (
    *("best", "best_epoch", "score", "loss", "active", "was_dropped"),
    *("epochs", "seconds", "reading_seconds", "train_loss", "loss_sum", "n_steps", "history"),
)


@dataclass(frozen=True)
class TrainingProgress:
    """How far a pass is: whole epochs, and steps of the next one."""

    epochs: int = 0
    steps: int = 0


class Checkpoint:
    """The checkpoint file of a run; without a path nothing is saved.

    Args:
        path: the file.
        states: what is saved and restored.
        device: where the states are restored to.
    """

    def __init__(self, path: Path | None, states: Sequence[TrainState], device: torch.device) -> None:
        self._path, self._states, self._device = path, states, device
        self._save_at = time.perf_counter() + _SAVE_EVERY_SECONDS

    def load(self) -> TrainingProgress:
        """Restore all states from the file; without a file the run starts at zero.

        Raises:
            JobError: the file is damaged.
        """
        if self._path is None or not self._path.exists():
            return TrainingProgress()
        try:
            return self._restore(self._path)
        except Exception as error:  # torch raises many types for a damaged file, or one of another run
            if is_shortage(error):
                raise
            raise JobError(f"the checkpoint {self._path} is damaged; delete it to start again") from error

    def _restore(self, path: Path) -> TrainingProgress:
        if not path.is_file() or not _passes_checksums(path):
            raise ValueError("it is no regular file, or a record of it is damaged")
        saved = torch.load(path, map_location=self._device, weights_only=True)
        if saved["file"] != path.name:
            raise ValueError(f"it is {saved['file']}")
        for parts, (candidate, optimizer, scheduler) in zip(saved["candidates"], self._states, strict=True):
            candidate.load(parts["model"])
            optimizer.load_state_dict(parts["optimizer"])
            scheduler.load_state_dict(parts["scheduler"])
            for name in _CANDIDATE_FIELDS:
                setattr(candidate, name, parts[name])
        return TrainingProgress(**saved["done"])

    @property
    def is_due(self) -> bool:
        """Whether it is time to save, so that little work can be lost and saving takes little of the time."""
        return self._path is not None and time.perf_counter() >= self._save_at

    def save(self, progress: TrainingProgress) -> None:
        """Replace the file atomically.

        Raises:
            JobError: it cannot be written; the previous one is kept.
        """
        if self._path is None:
            return
        started = time.perf_counter()
        candidates = [_state_of(each) for each in self._states]
        state = {"file": self._path.name, "done": asdict(progress), "candidates": candidates}
        try:
            # An open file, not a path, for which torch would raise a RuntimeError that does not name the reason.
            with replacing(self._path) as partial, partial.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            # After a failed write torch fails again as it closes its archive; the OSError is then the context.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise JobError(
                f"the checkpoint {self._path} cannot be written ({cause.strerror}); the one before it is kept"
            ) from error
        # schedule the next one, so that saving takes no more than its share of the time
        ended = time.perf_counter()
        self._save_at = ended + max(_SAVE_EVERY_SECONDS, (ended - started) / _SHARE_OF_TIME)


def _passes_checksums(path: Path) -> bool:
    """Whether every record matches its CRC-32, which torch writes but does not check when it reads."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _state_of(state: TrainState) -> dict[str, Any]:
    candidate, optimizer, scheduler = state
    return {
        "model": candidate.trained_state(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        **{name: getattr(candidate, name) for name in _CANDIDATE_FIELDS},
    }
