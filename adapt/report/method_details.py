"""Gathers what the page shows of a few methods in depth: classes, calibration, learning curves and search."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from adapt.report.class_results import ClassResults, class_results
from adapt.report.comparison import Comparison
from adapt.report.reported_rows import ReportedRows
from adapt.report.search_grid import SearchGrid, search_grid
from adapt.report.seed_averages import Summary
from adapt.report.small_charts import line_chart, reliability_chart
from adapt.run_dir.curves import find_curve, find_validated
from adapt.run_dir.results import Row

_MOST_METHODS = 6  # of one comparison
_MOST_OF_PAGE = 24  # of all comparisons together, so that the page stays small


@dataclass(frozen=True, kw_only=True)
class MethodDetails:
    """A method in depth.

    Args:
        summary: the method.
        classes: its results by class; None without predictions.
        drawings: small charts with their captions.
        search: its search; None if it had none.
    """

    summary: Summary
    classes: ClassResults | None
    drawings: Sequence[tuple[Markup, str]]
    search: SearchGrid | None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.classes or self.drawings or self.search)


def details_of(comparison: Comparison, reported: ReportedRows, n_comparisons: int) -> list[MethodDetails]:
    """The methods that are best on validation in depth, the best one first.

    Args:
        comparison: the methods.
        reported: their rows.
        n_comparisons: of the page; of many comparisons each has fewer methods.

    Raises:
        UserError: predictions are damaged.
        JobError: the file of a curve or a search is damaged.
    """
    most = max(1, min(_MOST_METHODS, _MOST_OF_PAGE // n_comparisons))
    found = [_details(comparison, summary, reported) for summary in comparison.by_validation[:most]]
    return [details for details in found if not details.is_empty]


def _details(comparison: Comparison, summary: Summary, reported: ReportedRows) -> MethodDetails:
    places = [(reported.run_dirs[row.trial_id], row) for row in summary.rows if row.trial_id in reported.run_dirs]
    classes = class_results(summary, reported.read_predictions)
    name = f"{summary.label} on {comparison.title}"
    drawings = _curves(name, places)
    search = next((grid for place in places if (grid := search_grid(*place))), None)
    if search and search.drawing:
        drawings.append((search.drawing, "Points of the search; a ring is around the chosen one."))
    if classes and classes.bins:
        chart = reliability_chart(f"Reliability of {name}", classes.bins)
        drawings.append((chart, "Accuracy by confidence; on the dashed line the two are equal."))
    return MethodDetails(summary=summary, classes=classes, drawings=drawings, search=search)


def _curves(name: str, places: Sequence[tuple[Path, Row]]) -> list[tuple[Markup, str]]:
    """Training loss of every seed, and the validation scores that are known."""
    curves = [curve for place in places if (curve := find_curve(*place))]
    validated = [curve for curve in curves if curve.is_validated]
    caption = "Validation score by epoch, a line a seed."
    if not validated:
        searched = next((curve for place in places if (curve := find_validated(*place))), None)
        validated = [searched] if searched else []
        caption = "Validation score by epoch, in the search; the trials above were then trained on validation data too."
    loss = line_chart(f"Training loss of {name}", "training loss", [curve.train_loss for curve in curves])
    score = line_chart(f"Validation score of {name}", "validation (%)", [curve.val_score for curve in validated])
    found = [(loss, "Training loss by epoch, a line a seed."), (score, caption)]
    return [(drawing, text) for drawing, text in found if drawing]
