"""Draws the results of several data sets and backbones in one figure: a row for each, a marker for each method."""

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapt.report.chart_labels import shortened
from adapt.report.comparison import Comparison
from adapt.report.evidence import Evidence
from adapt.report.seed_averages import Stat
from adapt.report.svg import MUTED, RULE, TEXT, svg_element, svg_file, svg_style
from store.errors import UserError

OVERVIEW_LEGEND = (
    "Test split, mean over seeds. Lines: 95 % intervals by bootstrap over the test samples; without predictions, one "
    "sample standard deviation over seeds."
)
# Legible on light and dark paper. Methods have different shapes too, for readers who cannot tell the colors apart.
_COLORS = ("#3f86d1", "#d1762b", "#35a06d", "#b865c9", "#c94f5e", "#8f8a2f", "#4aa5b5", "#96765f")
_MARKERS = "osD^vPX"

# Points
_METHOD, _BETWEEN, _LEGEND_LINE, _AROUND, _WIDTH, _CHARACTER = 9.0, 9.0, 16.0, 46.0, 518.0, 5.2
_LONGEST_NAME = 40  # characters


def overview(comparisons: Sequence[Comparison]) -> Markup:
    """The figure as an element of a page; empty if fewer than two comparisons have a result."""
    drawn = _with_result(comparisons)
    if len(drawn) < 2:
        return Markup("")
    with svg_style(_names(drawn)[0]):
        return svg_element(_draw(drawn), f"Results of {len(drawn)} comparisons by method. {OVERVIEW_LEGEND}")


def overview_file(comparisons: Sequence[Comparison]) -> str:
    """The figure as the content of a file.

    Raises:
        UserError: nothing has a result.
    """
    drawn = _with_result(comparisons)
    if not drawn:
        raise UserError("nothing to draw: no method has a result on a test split")
    with svg_style(_names(drawn)[0]):
        return svg_file(_draw(drawn))


def _with_result(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [comparison for comparison in comparisons if comparison.best]


def _draw(comparisons: Sequence[Comparison]) -> Figure:
    methods = list(dict.fromkeys(s.label for c in comparisons for s in c.summaries if c.stat(s)))
    names = [_short(name) for name in _names(comparisons)]
    left = 12 + _CHARACTER * max(map(len, names))
    columns = max(1, int((_WIDTH - left) // (24 + _CHARACTER * max(len(_short(method)) for method in methods))))
    top = 6 + _LEGEND_LINE * -(-len(methods) // columns)
    row = _METHOD * len(methods) + _BETWEEN
    height = top + row * len(comparisons) + _AROUND
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor="none")  # at 72 dpi a pixel is a point
    bottom = _AROUND - 6
    box = (left / _WIDTH, bottom / height, 1 - (left + 12) / _WIDTH, row * len(comparisons) / height)
    axes = figure.add_axes(box, facecolor="none")
    for number, comparison in enumerate(comparisons):
        _draw_row(axes, comparison, methods, row * number)
    _draw_frame(axes, names, row, _metrics(comparisons))
    _draw_legend(axes, methods, columns)
    return figure


def _draw_row(axes: Axes, comparison: Comparison, methods: Sequence[str], start: float) -> None:
    """The markers of one comparison, each with its interval, from `start` downwards."""
    if start:
        axes.axhline(start, color=RULE, linewidth=0.8)
    for summary in comparison.summaries:
        if (stat := comparison.stat(summary)) is None:
            continue
        place = methods.index(summary.label)
        y = start + _BETWEEN / 2 + _METHOD * (place + 0.5)
        color, marker = _style_of(place)
        axes.plot(_range(stat, comparison.evidence.get(summary.trial_ids)), [y, y], color=color, linewidth=1.5)
        axes.plot([stat.mean], [y], marker=marker, color=color, markersize=5, linestyle="none")


def _range(stat: Stat, evidence: Evidence | None) -> tuple[float, float]:
    if evidence:
        return evidence.interval.low, evidence.interval.high
    return stat.mean - (stat.std or 0.0), stat.mean + (stat.std or 0.0)


def _draw_frame(axes: Axes, names: Sequence[str], row: float, metrics: str) -> None:
    axes.set_ylim(row * len(names), 0)
    axes.set_yticks([row * (number + 0.5) for number in range(len(names))], names, parse_math=False)
    axes.set_xlabel(f"{metrics}, test (%)", color=TEXT)
    axes.tick_params(colors=TEXT, length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _draw_legend(axes: Axes, methods: Sequence[str], columns: int) -> None:
    handles = []
    for place in range(len(methods)):
        color, marker = _style_of(place)
        handles += axes.plot([], [], marker=marker, color=color, markersize=5, linewidth=1.5)
    legend = axes.legend(
        handles,
        [_short(method) for method in methods],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        labelcolor=TEXT,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _style_of(place: int) -> tuple[str, str]:
    return _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    """What each row is of: the data set, and what differs beside it."""
    has_one_backbone = len({comparison.backbone for comparison in comparisons}) == 1
    has_one_metric = len({comparison.metric for comparison in comparisons}) == 1
    return [
        " · ".join(
            text
            for text in (
                comparison.dataset,
                "" if has_one_backbone else comparison.backbone,
                comparison.protocol,
                "" if has_one_metric else comparison.metric_name,
            )
            if text
        )
        for comparison in comparisons
    ]


def _metrics(comparisons: Sequence[Comparison]) -> str:
    return " or ".join(dict.fromkeys(comparison.metric_name for comparison in comparisons))


def _short(text: str) -> str:
    return shortened(text, _LONGEST_NAME)
