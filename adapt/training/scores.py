"""Keeps the validation scores of a search in a file, from which an interrupted search resumes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapt.config.trials import Trial
from adapt.run_dir.files import damaged, read_json, write_json
from adapt.training.candidate import diverged

_Number = Annotated[float, Field(ge=-math.inf)]  # no nan; minus infinity for a trial that diverged
Rank = tuple[bool, int, float, float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a trial did on validation.

    Args:
        score: of its best epoch; minus infinity if it diverged in the first one.
        loss: of its best epoch.
        epoch: its best epoch, from 1 on.
        epochs: that it was trained for; fewer than the others if successive halving dropped it. Not compared for a
            method that is solved.
    """

    score: float
    loss: float
    epoch: int
    epochs: int


class Point(BaseModel):
    """A trial of a search with its score."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    options: dict[str, Any]
    lr: float | None
    weight_decay: float
    score: _Number
    loss: _Number
    epoch: int
    epochs: int

    @property
    def key(self) -> str:
        """The `Trial.key` of the trial."""
        return Trial.key_of(self.options, self.lr, self.weight_decay)


class _Document(BaseModel):
    """The file of a search; `search` repeats its name, so that a file of another search is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    search: str
    method: str
    points: list[Point]


class SearchScores:
    """The scores of a search so far, in memory and in its file.

    Args:
        path: the file; it may not exist yet.
        method: name of the method.
        full_epochs: epochs of a trial that is not dropped; 0 for a method that is solved.

    Raises:
        JobError: the file is damaged, or belongs to another search.
    """

    def __init__(self, path: Path, method: str, full_epochs: int) -> None:
        self._path, self._method, self._full_epochs = path, method, full_epochs
        self._points = {point.key: point for point in self._read()}

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._points

    @property
    def points(self) -> list[Point]:
        """All points, in the order in which they were added."""
        return list(self._points.values())

    def find(self, trial: Trial) -> Point:
        """The point of a trial that has a score."""
        return self._points[trial.key]

    def was_dropped(self, trial: Trial) -> bool:
        """Whether successive halving dropped a trial."""
        return self.find(trial).epochs < self._full_epochs

    def rank(self, trial: Trial) -> Rank:
        """Higher is better: trials that did not diverge, then those trained longest, then by score and minus loss."""
        point = self.find(trial)
        return point.score > -math.inf, min(point.epochs, self._full_epochs), point.score, -point.loss

    def best(self, trials: Sequence[Trial]) -> Trial:
        """The trial that ranks highest.

        Raises:
            JobError: all of them diverged.
        """
        best = max((trial for trial in trials if trial in self), key=self.rank)
        if self.find(best).score == -math.inf:
            raise diverged(trial.lr for trial in trials)
        return best

    def add(self, trials: Sequence[Trial], scores: Sequence[Score]) -> None:
        """Add scores of trials, and write the file.

        Raises:
            JobError: the file cannot be written.
        """
        for trial, score in zip(trials, scores, strict=True):
            fields = trial.model_dump(mode="json", serialize_as_any=True)
            self._points[trial.key] = Point(**fields, **asdict(score))
        document = _Document(search=self._path.stem, method=self._method, points=self.points)
        write_json(self._path, document.model_dump())

    def _read(self) -> list[Point]:
        if not self._path.exists():
            return []
        try:
            document = _Document.model_validate(read_json(self._path))
        except ValidationError as error:
            first = error.errors()[0]
            raise damaged(self._path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if (document.search, document.method) != (self._path.stem, self._method):
            raise damaged(self._path, f"it holds the scores of the search {document.search} of {document.method}")
        return document.points
