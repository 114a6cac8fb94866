"""Draws accuracy against a cost of training or inference, with the Pareto front, as one SVG element."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from adapt.report.chart_labels import POINTS_A_CHARACTER, POINTS_A_LINE, Box, find_place, place_label, shortened
from adapt.report.comparison import Comparison
from adapt.report.cost_axis import COST_AXES, CostAxis, Scale, scale_of
from adapt.report.pareto import front_of
from adapt.report.seed_averages import Summary
from adapt.report.svg import MUTED, RULE, TEXT, svg_element, svg_style
from adapt.report.trained_from import kinds_of, trained_from
from store.console.visible import visible

_HALF_MARKER = 4  # points
_LONGEST_LABEL = 32  # characters
_NEAR = 4  # half lines that a label may be away from the point of a method that is not on the front
_FONT_SIZE, _LABEL_SIZE = 10.5, 9.5
_WIDTH, _HEIGHT = 380, 280  # points
_LABEL_WIDTH = 1.2 * POINTS_A_CHARACTER  # of a character; labels on the front are bold


Place = tuple[float, float]  # on the axes


@dataclass(frozen=True)
class Chart:
    """A drawing, and a sentence that says what is on its Pareto front."""

    drawing: Markup
    sentence: str


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A method in a chart; `x` and `y` are in the units of the axes."""

    summary: Summary
    label: str
    x: float
    y: float
    spread: float
    is_on_front: bool


def charts(comparison: Comparison) -> list[Chart]:
    """A chart for each cost that at least two methods have; for the trained parameters one method is enough."""
    found = [_chart(comparison, axis) for axis in COST_AXES]
    return [chart for chart in found if chart]


def _chart(comparison: Comparison, axis: CostAxis) -> Chart | None:
    known = [s for s in comparison.summaries if comparison.stat(s) and axis.value(s) is not None]
    if len(known) < axis.least:
        return None
    values = [axis.value(summary) or 0.0 for summary in known]
    scale = scale_of(values, is_log=axis.is_log)
    signed = [-value if axis.more_is_better else value for value in values]
    front = front_of(list(zip(signed, [comparison.mean(s) for s in known], strict=True)))
    drawn = [
        _drawn(comparison, s, scale.place(v), k in front) for k, (s, v) in enumerate(zip(known, values, strict=True))
    ]
    names = ", ".join(known[k].label for k in front)
    title = f"{comparison.metric_name} against {axis.name} of {len(known)} methods. Pareto front: {visible(names)}."
    with svg_style(f"{comparison.title} {axis.field}", _FONT_SIZE):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="none")  # at 72 dpi a pixel is a point
        axes = figure.add_axes((0.135, 0.145, 0.855, 0.845), facecolor="none")
        _draw_x_axis(axes, axis, scale)
        _draw(
            axes,
            comparison,
            drawn,
            _stairs([drawn[k] for k in front], scale.low if axis.more_is_better else scale.high),
        )
        return Chart(svg_element(figure, title), f"Pareto front: {names}.{axis.note}")


def _drawn(comparison: Comparison, summary: Summary, x: float, is_on_front: bool) -> _Drawn:
    stat = comparison.stat(summary)
    assert stat is not None
    has_fewer = len(summary.seeds) < comparison.most_seeds
    label = f"{summary.label} ({comparison.seeds_note(summary)})" if has_fewer else summary.label
    return _Drawn(summary=summary, label=label, x=x, y=stat.mean, spread=stat.std or 0.0, is_on_front=is_on_front)


def _draw(axes: Axes, comparison: Comparison, drawn: Sequence[_Drawn], front: Sequence[Place]) -> None:
    _draw_y_axis(axes, f"{comparison.metric_name} (%)", drawn)
    for kind in kinds_of([method.summary for method in drawn]):
        of_kind = [method for method in drawn if trained_from(method.summary) == kind]
        xs, ys, spreads = zip(*((method.x, method.y, method.spread) for method in of_kind), strict=True)
        axes.errorbar(xs, ys, spreads, fmt=kind.marker, color=kind.color, markersize=7, elinewidth=1.2, zorder=3)
    axes.plot(*zip(*front, strict=True), color=TEXT, linewidth=1, alpha=0.45, zorder=2)
    # labels avoid the markers, the front and the line of the linear probe
    occupied = [_marker_box(axes, method) for method in drawn]
    occupied += [_line_box(axes, *ends) for ends in itertools.pairwise(front)]
    if comparison.probe:
        height = comparison.mean(comparison.probe)
        axes.axhline(height, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        occupied.append(_line_box(axes, (axes.get_xlim()[0], height), (axes.get_xlim()[1], height)))
    _draw_labels(axes, drawn, occupied)


def _stairs(front: Sequence[_Drawn], end: float) -> list[Place]:
    """The front from its cheapest method to the dear end of the axis.

    It is no straight line: between the costs of two methods, the cheaper one is what can be had.
    """
    corners = [(front[0].x, front[0].y)]
    for method in front[1:]:
        corners += [(method.x, corners[-1][1]), (method.x, method.y)]
    return [*corners, (end, corners[-1][1])]


def _draw_x_axis(axes: Axes, axis: CostAxis, scale: Scale) -> None:
    axes.set_xticks([tick.place for tick in scale.ticks], [tick.text for tick in scale.ticks])
    axes.set_xlim(scale.low, scale.high)
    axes.set_xlabel(f"{axis.name}{scale.note}", color=TEXT)


def _draw_y_axis(axes: Axes, title: str, drawn: Sequence[_Drawn]) -> None:
    low = min(method.y - method.spread for method in drawn)
    high = max(method.y + method.spread for method in drawn)
    pad = max(0.08 * (high - low), 0.5)
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(title, color=TEXT)
    axes.tick_params(colors=TEXT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _marker_box(axes: Axes, method: _Drawn) -> Box:
    """A marker with its error bar."""
    ends = [(method.x, method.y - method.spread), (method.x, method.y + method.spread)]
    (left, bottom), (right, top) = axes.transData.transform(ends).tolist()
    return Box(left - _HALF_MARKER, bottom - _HALF_MARKER, right + _HALF_MARKER, top + _HALF_MARKER)


def _line_box(axes: Axes, start: Place, end: Place) -> Box:
    """A line that is level or upright."""
    (x0, y0), (x1, y1) = axes.transData.transform([start, end]).tolist()
    return Box(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1)


def _draw_labels(axes: Axes, drawn: Sequence[_Drawn], occupied: Sequence[Box]) -> None:
    """Label the methods on the front wherever there is room, then the others where there is room beside them."""
    occupied, frame = list(occupied), Box(*map(float, axes.bbox.extents))
    for method in sorted(drawn, key=lambda method: not method.is_on_front):
        x, y = axes.transData.transform((method.x, method.y)).tolist()
        text = shortened(method.label, _LONGEST_LABEL)
        width = _LABEL_WIDTH * len(text)
        if method.is_on_front:
            place = place_label((x, y), width, frame, occupied)
        elif (near := find_place((x, y), width, frame, occupied, most_steps=_NEAR)) is None:
            continue
        else:
            place = near
        occupied.append(place)
        label = _draw_label(axes, (x, y), place, text)
        label.set_fontweight("bold" if method.is_on_front else "normal")


def _draw_label(axes: Axes, point: tuple[float, float], place: Box, text: str) -> Annotation:
    """A label, with a line to its point if it is far away."""
    center = ((place.left + place.right) / 2, (place.bottom + place.top) / 2)
    is_far = abs(center[1] - point[1]) > 1.4 * POINTS_A_LINE
    return axes.annotate(
        text,
        point,
        center,
        xycoords="figure pixels",
        textcoords="figure pixels",
        ha="center",
        va="center",
        color=TEXT,
        fontsize=_LABEL_SIZE,
        parse_math=False,
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8} if is_far else None,
    )
