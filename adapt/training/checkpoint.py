"""The state of a training run, kept in a file as it goes, so that an interrupted run ends as any other."""

import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapt.training.candidate import Candidate
from store.errors import JobError
from store.local.durable_files import replacing
from store.out_of_memory import is_shortage

_SAVE_EVERY_SECONDS = 5.0  # what an interruption may cost
_SHARE_OF_TIME = 1 / 20  # that saving may take; large models are saved less often


class Member(NamedTuple):
    """A candidate and what moves it."""

    candidate: Candidate
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


@dataclass(frozen=True)
class Done:
    """How far a run has come: whole epochs, steps of the one that follows, and the seconds of all of them."""

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0


class Checkpoint:
    """The file of a run, or none."""

    def __init__(self, path: Path | None, members: Sequence[Member], device: torch.device) -> None:
        self._path, self._members, self._device = path, members, device
        self._rng: list[Tensor] = []
        self._save_at = time.perf_counter() + _SAVE_EVERY_SECONDS

    def load(self) -> Done:
        """Go on where an interrupted run was; nothing is done where there was none.

        Raises:
            JobError: the file is damaged.
        """
        if self._path is None or not self._path.exists():
            return Done()
        try:
            return self._restore(self._path)
        except Exception as error:  # whatever torch finds wrong with it, or another run's state
            if is_shortage(error):
                raise
            raise JobError(f"the checkpoint {self._path} is damaged; delete it to start anew") from error

    def _restore(self, path: Path) -> Done:
        if not path.is_file() or not _is_whole(path):
            raise ValueError("it is no regular file, or a record of it is damaged")
        saved = torch.load(path, map_location=self._device, weights_only=True)
        if saved["file"] != path.name:
            raise ValueError(f"it is {saved['file']}")
        for parts, (candidate, optimizer, scheduler) in zip(saved["candidates"], self._members, strict=True):
            candidate.load(parts["model"])
            optimizer.load_state_dict(parts["optimizer"])
            scheduler.load_state_dict(parts["scheduler"])
            candidate.best, candidate.best_epoch = parts["best"], parts["best_epoch"]
            candidate.score, candidate.loss = parts["score"], parts["loss"]
        self._rng = [state.cpu() for state in saved["rng"]]
        return Done(**saved["done"])

    def restore_rng(self) -> None:
        """Draw dropout from where the interrupted run was."""
        if self._rng:
            for generator, state in zip(_generators(self._device), self._rng, strict=True):
                generator.set_state(state)

    def save(self, done: Done) -> None:
        """Replace the file whole, unless it is fresh.

        Raises:
            JobError: it cannot be written; the one before it stays.
        """
        started = time.perf_counter()
        if self._path is None or started < self._save_at:
            return
        rng = [generator.get_state() for generator in _generators(self._device)]
        candidates = [_state(each) for each in self._members]
        state = {"file": self._path.name, "done": asdict(done), "rng": rng, "candidates": candidates}
        try:
            # Given a path, torch would not say what is wrong; and of a write that fails it raises two errors.
            with replacing(self._path) as partial, partial.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            refused = error if isinstance(error, OSError) else error.__context__
            if not isinstance(refused, OSError):
                raise
            raise JobError(
                f"the checkpoint {self._path} cannot be written ({refused.strerror}); the one before it is kept"
            ) from error
        ended = time.perf_counter()
        self._save_at = ended + max(_SAVE_EVERY_SECONDS, (ended - started) / _SHARE_OF_TIME)


def _is_whole(path: Path) -> bool:
    """Whether every record has its CRC-32: torch writes them, and does not compare them when it reads."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _state(member: Member) -> dict[str, Any]:
    candidate, optimizer, scheduler = member
    return {
        "model": candidate.trained_state(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best": candidate.best,
        "best_epoch": candidate.best_epoch,
        "score": candidate.score,
        "loss": candidate.loss,
    }


def _generators(device: torch.device) -> list[torch.Generator]:
    """What dropout draws from."""
    if device.type != "cuda":
        return [torch.default_generator]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[number]]
