"""Prints and draws the scores of layers for `sidecache layers`."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from adapt.planning.layer_scores import LayerScores, StoreScores
from adapt.report.svg import ACCENT, MUTED, RULE, TEXT, svg_file, svg_style
from store.console.terminal import Terminal
from store.console.visible import one_line, visible

_MEANING = {"pooled": "pooled tokens: what is shown", "grid": "grid of patches: where it is"}


def print_scores(scores: StoreScores) -> None:
    """Print a table for every reading, and the layers that it proposes."""
    terminal = Terminal()
    for reading in scores.readings:
        terminal.print(_table(scores, reading))
        terminal.print(_proposal(scores, reading))


def _table(scores: StoreScores, reading: LayerScores) -> Table:
    table = Table(title=one_line(f"{scores.dataset}, {_MEANING[reading.reading]}"))
    for name in ("layer", f"alone, {scores.metric}", "all others", "chosen as", "those so far"):
        table.add_column(name, justify="right")
    for layer, alone in reading.alone.items():
        place = reading.order.index(layer) if layer in reading.order else None
        without = f"{reading.without[layer]:.1f}" if layer in reading.without else "–"
        chosen = ("–", "–") if place is None else (str(place + 1), f"{reading.scores[place]:.1f}")
        table.add_row(str(layer), f"{alone:.1f}", without, *chosen)
    return table


def _proposal(scores: StoreScores, reading: LayerScores) -> str:
    score = reading.scores[len(reading.proposed) - 1]
    return (
        f"all {len(reading.alone)} layers: {reading.together:.1f}. Within one standard error of the best: "
        f"store.layers: {reading.proposed} ({score:.1f}, {scores.n_samples:,} samples, each left out once)"
    )


def draw_scores(scores: StoreScores) -> str:
    """The curves as an SVG file: the score of every layer alone, and of the first chosen layers together."""
    with svg_style(scores.store):
        n = len(scores.readings)
        figure = Figure(figsize=(7.2, 2.9 * n), dpi=72, facecolor="none")
        for row, reading in enumerate(scores.readings):
            for column, draw in enumerate((_draw_alone, _draw_chosen)):
                axes = figure.add_axes((0.08 + 0.5 * column, (n - 1 - row + 0.17) / n, 0.4, 0.68 / n), facecolor="none")
                _style(axes)
                draw(axes, reading)
                axes.set_title(visible(f"{scores.dataset}, {reading.reading}"), color=TEXT, fontsize=9)
                axes.set_ylabel(f"{scores.metric} (%)", color=TEXT)
        return svg_file(figure)


def _draw_alone(axes: Axes, reading: LayerScores) -> None:
    axes.plot(list(reading.alone), list(reading.alone.values()), "o-", color=ACCENT, markersize=4)
    axes.axhline(reading.together, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("layer, alone (dashed: all together)", color=TEXT)


def _draw_chosen(axes: Axes, reading: LayerScores) -> None:
    numbers = range(1, len(reading.scores) + 1)
    axes.plot(numbers, reading.scores, "o-", color=ACCENT, markersize=4)
    axes.axvline(len(reading.proposed), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(list(numbers), [str(layer) for layer in reading.order])
    axes.set_xlabel("layers, each added to those before it", color=TEXT)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=TEXT)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
