"""Draws the small charts of one method: learning curves, the points of a search, and reliability."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adapt.report.cost_axis import scale_of
from adapt.report.svg import ACCENT, MUTED, RULE, TEXT, svg_element, svg_style
from adapt.training.calibration import ConfidenceBin

_FONT_SIZE = 9.5
_WIDTH, _HEIGHT = 240, 175  # points

Values = Sequence[float | None]  # None where unknown


@dataclass(frozen=True)
class _Canvas:
    """A figure in the making; `drawing` is the SVG element when it is done."""

    figure: Figure
    axes: Axes


def line_chart(title: str, name: str, lines: Sequence[Values]) -> Markup:
    """Values by epoch, a line each; empty if no value is known.

    Args:
        title: for readers who do not see it.
        name: of the values.
        lines: the values of epochs 1, 2, ...
    """
    known = [[(k, value) for k, value in enumerate(line, start=1) if value is not None] for line in lines]
    if not any(known):
        return Markup("")
    with svg_style(title, _FONT_SIZE):
        canvas = _canvas("epoch", name)
        for line in known:
            if line:
                marker = "o" if len(line) == 1 else ""
                canvas.axes.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1.4, alpha=0.8, marker=marker)
        canvas.axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return svg_element(canvas.figure, title)


@dataclass(frozen=True)
class SearchPoint:
    """A point of a search: the value of one hyperparameter, and the validation score."""

    x: float
    score: float
    is_chosen: bool


def search_chart(title: str, name: str, points: Sequence[SearchPoint]) -> Markup:
    """Validation scores against one hyperparameter, with a ring around the chosen point.

    Args:
        title: for readers who do not see it.
        name: of the hyperparameter.
        points: at least one.
    """
    values = [point.x for point in points]
    scale = scale_of(values, is_log=_spans_decades(values))
    with svg_style(title, _FONT_SIZE):
        canvas = _canvas(f"{name}{scale.note}", "validation (%)")
        axes, xs = canvas.axes, [scale.place(value) for value in values]
        axes.plot(xs, [point.score for point in points], "o", color=ACCENT, markersize=5, alpha=0.8)
        chosen = [(x, point.score) for x, point in zip(xs, points, strict=True) if point.is_chosen]
        for x, score in chosen:
            axes.plot([x], [score], "o", color=TEXT, markersize=11, markerfacecolor="none", markeredgewidth=1.4)
        axes.set_xticks([tick.place for tick in scale.ticks], [tick.text for tick in scale.ticks])
        axes.set_xlim(scale.low, scale.high)
        axes.margins(y=0.15)
        return svg_element(canvas.figure, title)


def reliability_chart(title: str, bins: Sequence[ConfidenceBin]) -> Markup:
    """Accuracy by confidence; calibrated predictions are on the diagonal."""
    with svg_style(title, _FONT_SIZE):
        canvas = _canvas("confidence", "accuracy")
        axes = canvas.axes
        width = min(each.high - each.low for each in bins)
        middles = [(each.low + each.high) / 2 for each in bins]
        axes.bar(middles, [each.accuracy for each in bins], width * 0.9, color=ACCENT, alpha=0.75, linewidth=0)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        return svg_element(canvas.figure, title)


def _spans_decades(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) >= 10 * min(positive)


def _canvas(x_name: str, y_name: str) -> _Canvas:
    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="none")
    axes = figure.add_axes((0.2, 0.22, 0.77, 0.74), facecolor="none")
    axes.set_xlabel(x_name, color=TEXT, parse_math=False)
    axes.set_ylabel(y_name, color=TEXT, parse_math=False)
    axes.tick_params(colors=TEXT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    return _Canvas(figure, axes)
