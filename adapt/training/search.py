"""Chooses learning rate, weight decay and options of a method by their validation scores."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapt.config.pipeline import MethodConfig, Trial
from adapt.methods.registry import find_method
from adapt.run_dir.files import damaged, read_json, write_json
from adapt.training.candidate import Candidate
from adapt.training.trials import Trained, diverged

_WIDENINGS = 3  # how often a grid is extended where its best point is at an edge

TrainPass = Callable[[Sequence[Trial], str], Trained]
_Number = Annotated[float, Field(ge=-math.inf)]  # no nan; minus infinity for a trial that diverged


class Point(BaseModel):
    """A trial of the grid with its validation score, loss and best epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    options: dict[str, Any]
    lr: float | None
    weight_decay: float
    score: _Number
    loss: _Number
    epoch: int


Points = dict[Annotated[int, Field(strict=False)], Point]  # by the trial's position in the grid


class _Scores(BaseModel):
    """The file of a search; `search` repeats its name, so that a file of another search is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    search: str
    method: str
    points: Points


def choose_trial(method: MethodConfig, train: TrainPass, scores_file: Path) -> Trial:
    """Train all trials of a grid, and return the one with the best validation score.

    If the best trial has the lowest or highest learning rate or weight decay of the grid, the grid is extended beyond
    that edge and the search goes on.

    Args:
        method: the method with its grid.
        train: trains some trials; the second argument is a name for the pass.
        scores_file: file of all scores so far, from which an interrupted search resumes.

    Raises:
        JobError: training diverged at every point; the file is damaged.
    """
    trials = list(method.trials)
    if len(trials) == 1:
        return trials[0]
    points = read_points(scores_file)
    for _ in range(1 + _WIDENINGS):
        # train the trials that have no score yet, and save the scores after each pass
        for pending in _passes(method, [index for index in range(len(trials)) if index not in points]):
            candidates = train([trials[index] for index in pending], str(pending[0])).candidates
            points |= {index: _point(trials[index], c) for index, c in zip(pending, candidates, strict=True)}
            scores = _Scores(search=scores_file.stem, method=method.name, points=points)
            write_json(scores_file, scores.model_dump())
        # extend the grid beyond the best trial; nothing is added where that is inside
        best = max(range(len(trials)), key=lambda index: (points[index].score, -points[index].loss))
        if points[best].score == -math.inf:
            raise diverged(trials)
        trials += beyond_the_edge(trials, trials[best])
    return trials[best]


def read_points(scores_file: Path) -> Points:
    """The scores of a search so far.

    Raises:
        JobError: the file is damaged, or belongs to another search.
    """
    if not scores_file.exists():
        return {}
    try:
        scores = _Scores.model_validate(read_json(scores_file))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(scores_file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if scores.search != scores_file.stem:
        raise damaged(scores_file, f"it holds the scores of the search {scores.search}")
    return scores.points


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


def _passes(method: MethodConfig, pending: list[int]) -> list[list[int]]:
    """Trials that are trained together: all of them, or one by one where each needs its own copy of the backbone."""
    if find_method(method.name).trains_backbone:
        return [[index] for index in pending]
    return [pending] if pending else []


def _point(trial: Trial, candidate: Candidate) -> Point:
    fields = trial.model_dump(mode="json", serialize_as_any=True)
    return Point(**fields, score=candidate.score, loss=candidate.loss, epoch=candidate.best_epoch)
