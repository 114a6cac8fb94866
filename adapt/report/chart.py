"""Draws accuracy against trained parameters as one SVG element."""

import math

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapt.report.chart_labels import POINTS_A_CHARACTER, POINTS_A_LINE, Box, place_label, shortened
from adapt.report.comparison import Comparison, headline
from adapt.report.seed_averages import Summary
from adapt.report.svg import ACCENT, MUTED, RULE, TEXT, svg_element, svg_style
from store.console.visible import visible

_HALF_MARKER = 4  # points
_LONGEST_LABEL = 32  # characters


def chart(comparison: Comparison) -> Markup:
    """An SVG element that takes its colors from the page; empty if no method has a result."""
    summaries = [summary for summary in comparison.summaries if comparison.stat(summary)]
    if not summaries:
        return Markup("")
    title = f"{comparison.metric_name} against trained parameters. {visible(headline(comparison))}"
    with svg_style(comparison.title):
        figure = Figure(figsize=(7.2, 4.2), dpi=72, facecolor="none")  # at 72 dpi a pixel is a point
        axes = figure.add_axes((0.09, 0.13, 0.89, 0.83), facecolor="none")
        _draw(axes, comparison, summaries)
        return svg_element(figure, title)


def _draw(axes: Axes, comparison: Comparison, summaries: list[Summary]) -> None:
    stats = [stat for summary in summaries if (stat := comparison.stat(summary))]
    xs = _draw_x_axis(axes, summaries)
    ys = [stat.mean for stat in stats]
    spreads = [stat.std or 0.0 for stat in stats]
    _draw_y_axis(axes, f"{comparison.metric_name} (%)", ys, spreads)
    axes.errorbar(xs, ys, yerr=spreads, fmt="o", color=ACCENT, markersize=7, elinewidth=1.5, zorder=3)
    # labels avoid the markers and the line of the linear probe
    occupied = [_marker_box(axes, *point) for point in zip(xs, ys, spreads, strict=True)]
    if comparison.probe:
        height = comparison.mean(comparison.probe)
        axes.axhline(height, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        y = float(axes.transData.transform((0, height))[1])
        occupied.append(Box(float(axes.bbox.x0), y - 1, float(axes.bbox.x1), y + 1))
    points = axes.transData.transform(list(zip(xs, ys, strict=True))).tolist()
    _draw_labels(axes, points, [shortened(summary.label, _LONGEST_LABEL) for summary in summaries], occupied)


def _draw_x_axis(axes: Axes, summaries: list[Summary]) -> list[float]:
    """Draw decades, with 0 parameters (the linear probe) one decade before the smallest; return the x of each point."""
    decades = [len(str(s.trainable_params)) - 1 for s in summaries if s.trainable_params]
    low, high = min(decades, default=0), max(decades, default=0) + 1
    has_zero = len(decades) < len(summaries)
    start = low - 1 if has_zero else low
    ticks = list(range(start, high + 1)) if decades else [start]
    axes.set_xticks(ticks, ["0" if tick < low else f"{10**tick:,}" for tick in ticks])
    axes.set_xlim(start - 0.3, high + 0.3)
    axes.set_xlabel("trained parameters, without the head" + (" (log, and 0)" if has_zero else " (log)"), color=TEXT)
    return [math.log10(s.trainable_params) if s.trainable_params else float(start) for s in summaries]


def _draw_y_axis(axes: Axes, title: str, ys: list[float], spreads: list[float]) -> None:
    low = min(y - spread for y, spread in zip(ys, spreads, strict=True))
    high = max(y + spread for y, spread in zip(ys, spreads, strict=True))
    pad = max(0.12 * (high - low), 0.5)
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(title, color=TEXT)
    axes.tick_params(colors=TEXT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _marker_box(axes: Axes, x: float, y: float, spread: float) -> Box:
    """A marker with its error bar."""
    (left, bottom), (right, top) = axes.transData.transform([(x, y - spread), (x, y + spread)]).tolist()
    return Box(left - _HALF_MARKER, bottom - _HALF_MARKER, right + _HALF_MARKER, top + _HALF_MARKER)


def _draw_labels(axes: Axes, points: list[list[float]], texts: list[str], occupied: list[Box]) -> None:
    """Draw each label at the nearest free position around its point, with a line to the point if it is far away."""
    occupied = list(occupied)
    frame = Box(*map(float, axes.bbox.extents))
    for (x, y), text in zip(points, texts, strict=True):
        place = place_label((x, y), POINTS_A_CHARACTER * len(text), frame, occupied)
        occupied.append(place)
        center = ((place.left + place.right) / 2, (place.bottom + place.top) / 2)
        is_far = abs(center[1] - y) > 1.4 * POINTS_A_LINE
        axes.annotate(
            text,
            (x, y),
            center,
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            color=TEXT,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8} if is_far else None,
        )
