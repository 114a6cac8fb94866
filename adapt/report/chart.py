"""Accuracy against trained parameters, as one SVG element."""

import io
import math
import re
import warnings
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapt.report.chart_labels import POINTS_A_CHARACTER, POINTS_A_LINE, Box, place_label
from adapt.report.comparison import METRIC_NAMES, Comparison, headline
from adapt.report.seed_averages import Summary
from store.console.visible import visible

# Colors that stand for CSS variables of the page, so that one drawing serves light and dark mode.
TEXT, ACCENT, RULE, MUTED = "#010203", "#040506", "#070809", "#0a0b0c"
CSS_COLOURS = {TEXT: "currentColor", ACCENT: "var(--accent)", RULE: "var(--rule)", MUTED: "var(--muted)"}


def chart(section: Comparison) -> Markup:
    """Accuracy against trained parameters as an SVG element that takes its colors from the page."""
    known = [s for s in section.summaries if section.stat(s)]
    if not known:
        return Markup("")
    salt = visible(section.title)  # the same rows give the same bytes
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts have it
        figure = Figure(figsize=(7.2, 4.2), dpi=72, facecolor="none")  # 72: a pixel is a point
        axes = figure.add_axes((0.09, 0.13, 0.89, 0.83), facecolor="none")
        _draw(axes, section, known)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(
        buffer.getvalue(), f"{METRIC_NAMES[section.metric]} against trained parameters. {visible(headline(section))}"
    )


def _draw(axes: Axes, section: Comparison, known: list[Summary]) -> None:
    stats = [stat for s in known if (stat := section.stat(s))]
    xs, ys, spreads = _draw_x_axis(axes, known), [s.mean for s in stats], [s.std or 0.0 for s in stats]
    low, high = (sign * max(sign * y + e for y, e in zip(ys, spreads, strict=True)) for sign in (-1, 1))
    pad = max(0.12 * (high - low), 0.5)
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(f"{METRIC_NAMES[section.metric]} (%)", color=TEXT)
    axes.tick_params(colors=TEXT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    if section.probe:
        axes.axhline(section.mean(section.probe), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.errorbar(xs, ys, yerr=spreads, fmt="o", color=ACCENT, markersize=7, elinewidth=1.5, zorder=3)
    taken = [_marker_box(axes, *point) for point in zip(xs, ys, spreads, strict=True)]
    if section.probe:
        y = float(axes.transData.transform((0, section.mean(section.probe)))[1])
        taken.append(Box(float(axes.bbox.x0), y - 1, float(axes.bbox.x1), y + 1))
    _draw_labels(axes, xs, ys, [_short(s.label) for s in known], taken)


def _draw_x_axis(axes: Axes, known: list[Summary]) -> list[float]:
    """Decades, with 0 parameters (the linear probe) one decade before the smallest; returns the x of every point."""
    digits = [len(str(s.trainable_params)) - 1 for s in known if s.trainable_params]
    low, high = min(digits, default=0), max(digits, default=0) + 1
    has_zero = len(digits) < len(known)
    start = low - 1 if has_zero else low
    ticks = list(range(start, high + 1)) if digits else [start]
    names = ["0" if tick < low else f"{10**tick:,}" for tick in ticks]
    axes.set_xticks(ticks, names)
    axes.set_xlim(start - 0.3, high + 0.3)
    axes.set_xlabel("trained parameters, without the head" + (" (log, and 0)" if has_zero else " (log)"), color=TEXT)
    return [math.log10(s.trainable_params) if s.trainable_params else float(start) for s in known]


def _marker_box(axes: Axes, x: float, y: float, spread: float) -> Box:
    (left, bottom), (right, top) = axes.transData.transform([(x, y - spread), (x, y + spread)]).tolist()
    return Box(left - 4, bottom - 4, right + 4, top + 4)


def _short(text: str) -> str:
    text = " ".join(visible(text).split())
    return text if len(text) <= 32 else f"{text[:31]}…"


def _draw_labels(axes: Axes, xs: list[float], ys: list[float], texts: list[str], taken: list[Box]) -> None:
    """Each label at the nearest free place around its point."""
    anchors = axes.transData.transform(list(zip(xs, ys, strict=True))).tolist()
    taken = list(taken)
    frame = Box(*map(float, axes.bbox.extents))
    for (x, y), text in zip(anchors, texts, strict=True):
        place = place_label(x, y, POINTS_A_CHARACTER * len(text), frame, taken)
        taken.append(place)
        center = ((place.left + place.right) / 2, (place.bottom + place.top) / 2)
        far = abs(center[1] - y) > 1.4 * POINTS_A_LINE
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
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8} if far else None,
        )


def _inline(svg: str, title: str) -> Markup:
    """The bare element: no XML prologue, no name spaces, ids only where something refers to them."""
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for color, variable in CSS_COLOURS.items():
        body = body.replace(color, variable)
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}"><title>{}</title>')
    return opening.format(view_box[1], title, title) + Markup(body)
