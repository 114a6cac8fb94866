"""Shows the search of a method: its points with their validation scores, and the one that was chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adapt.config.trials import Trial
from adapt.report.comparison import UNKNOWN
from adapt.report.seed_averages import differing
from adapt.report.small_charts import SearchPoint, search_chart
from adapt.run_dir.results import Row
from adapt.training.scores import Point, SearchScores

_MOST_LISTED = 100


@dataclass(frozen=True, kw_only=True)
class ListedPoint:
    """A point of a search as texts; `cells` are its hyperparameters."""

    cells: Sequence[str]
    score: str
    epoch: int
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class SearchGrid:
    """The search of a method.

    Args:
        names: the hyperparameters in which its points differ.
        listed: its points, the best one first; of many only the first.
        n_points: how many it has.
        drawing: scores against one hyperparameter; empty if none is a number.
    """

    names: Sequence[str]
    listed: Sequence[ListedPoint]
    n_points: int
    drawing: Markup


def search_grid(run_dir: Path, row: Row) -> SearchGrid | None:
    """The search that chose the trial of a row; None if there was none.

    Raises:
        JobError: the file of a search is damaged.
    """
    points = _points_of(run_dir, row)
    if len(points) < 2:
        return None
    values = [_hyperparameters(point) for point in points]
    names = [name for name in values[0] if name in differing(values)]
    scores = [(point.score, -point.loss) for point in points]
    order = sorted(range(len(points)), key=scores.__getitem__, reverse=True)
    listed = [
        ListedPoint(
            cells=[_text(values[k].get(name)) for name in names],
            score=f"{points[k].score:.2f}" if points[k].score > -math.inf else "diverged",
            epoch=points[k].epoch,
            is_chosen=_is_chosen(points[k], row),
        )
        for k in order[:_MOST_LISTED]
    ]
    return SearchGrid(names=names, listed=listed, n_points=len(points), drawing=_draw(row, names, points, values))


def _points_of(run_dir: Path, row: Row) -> list[Point]:
    """The points of the search with the chosen one; of several, of that with its score, then of the largest."""
    searches = [
        SearchScores(path, row.method, full_epochs=0).points
        for path in sorted((run_dir / "search").glob(f"{row.method}-*.json"))
    ]
    found = [points for points in searches if any(_is_chosen(point, row) for point in points)]

    def fits(points: Sequence[Point]) -> tuple[bool, int]:
        return any(_is_chosen(point, row) and point.score == row.val_score for point in points), len(points)

    return max(found, key=fits, default=[])


def _is_chosen(point: Point, row: Row) -> bool:
    return point.key == Trial.key_of(row.options, row.lr, row.weight_decay)


def _hyperparameters(point: Point) -> dict[str, Any]:
    return {"learning rate": point.lr, "weight decay": point.weight_decay, **point.options}


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _draw(row: Row, names: Sequence[str], points: Sequence[Point], values: Sequence[Mapping[str, Any]]) -> Markup:
    """Scores against the first hyperparameter whose values are numbers."""
    numeric = [name for name in names if all(type(value.get(name)) in (int, float) for value in values)]
    drawn = [
        SearchPoint(float(value[numeric[0]]), point.score, _is_chosen(point, row))
        for point, value in zip(points, values, strict=True)
        if numeric and point.score > -math.inf
    ]
    if not drawn:
        return Markup("")
    return search_chart(f"Search of {row.method}: validation score by {numeric[0]}", numeric[0], drawn)
