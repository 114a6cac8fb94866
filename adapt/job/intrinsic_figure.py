"""Prints and draws a measurement of the intrinsic dimension: a table on the terminal, and the paper's figure as SVG."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from adapt.job.intrinsic_dimension import SHARE, Curve, Measurement
from adapt.methods.in_backbone.target_modules import Sublayer
from adapt.report.svg import MUTED, TEXT, svg_file, svg_style
from store.console.terminal import Terminal

_COLORS: dict[Sublayer, str] = {"attention": "#3f86d1", "mlp": "#d1762b"}


def print_measurement(measurement: Measurement) -> None:
    """Print the scores as a table, and every d_t, on standard output."""
    console = Terminal()
    table = Table(box=box.SIMPLE)
    for heading in ("d", *(curve.module for curve in measurement.curves)):
        table.add_column(heading, justify="right")
    for dim, *points in zip(measurement.dims, *(curve.points for curve in measurement.curves), strict=True):
        table.add_row(f"{dim:,}", *(f"{point.score:.2f}" for point in points))
    console.print(f"validation score in percent, block {measurement.block}", table)
    console.print(f"full fine-tuning: {measurement.full_score:.2f}, {SHARE:.0%} of it: {measurement.goal:.2f}")
    for curve in measurement.curves:
        console.print(measurement.describe(curve))


def draw(measurement: Measurement) -> str:
    """Draw score over d as SVG; a ring marks d_t, a dashed line the goal. Equal measurements give equal bytes."""
    with svg_style("intrinsic"):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        for curve in measurement.curves:
            _draw_curve(axes, measurement, curve)
        axes.axhline(measurement.goal, color=MUTED, linestyle="--", label=f"{SHARE:.0%} of full fine-tuning")
        axes.set_xscale("log")
        axes.set_xticks(measurement.dims, [f"{dim:,}" for dim in measurement.dims])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"d, dimensions of the subspace of one module of block {measurement.block} (log)", color=TEXT)
        axes.set_ylabel("validation score (%)", color=TEXT)
        axes.tick_params(colors=TEXT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(MUTED)
        axes.legend(frameon=False, labelcolor=TEXT)
        return svg_file(figure)


def _draw_curve(axes: Axes, measurement: Measurement, curve: Curve) -> None:
    dims, scores = [point.dim for point in curve.points], [point.score for point in curve.points]
    color, reached = _COLORS[curve.module], curve.reach(measurement.goal)
    axes.plot(dims, scores, marker="o", color=color, label=measurement.describe(curve))
    if reached:
        axes.plot([reached.dim], [reached.score], "o", color=color, markersize=13, markerfacecolor="none")
