"""The summary of a run: a table for the terminal, and `report.html`, one file that loads nothing else."""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapt.results import Metric, Row, Stat, Summary, differing_options, label, summarise, write_atomically
from store.errors import UserError

METRIC_NAMES: dict[Metric, str] = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class",
    "macro_f1": "macro F1",
    "mean_average_precision": "mAP",
}
UNKNOWN = "–"
# Colours that stand for CSS variables of the page, so that one drawing serves light and dark mode.
TEXT, ACCENT, RULE, MUTED = "#010203", "#040506", "#070809", "#0a0b0c"
CSS_COLOURS = {TEXT: "currentColor", ACCENT: "var(--accent)", RULE: "var(--rule)", MUTED: "var(--muted)"}
POINTS_A_CHARACTER, POINTS_A_LINE = 5.0, 11.0  # of the chart's labels, on average


@dataclass(frozen=True)
class Section:
    """All groups of one dataset and backbone, and the metric they are compared by."""

    dataset: str
    backbone: str
    metric: Metric
    summaries: tuple[Summary, ...]

    def stat(self, summary: Summary) -> Stat | None:
        stat: Stat | None = getattr(summary, self.metric)
        return stat

    def mean(self, summary: Summary) -> float:
        """For ranking: an unknown metric comes last."""
        stat = self.stat(summary)
        return float("-inf") if stat is None else stat.mean

    @property
    def best(self) -> Summary | None:
        best = max(self.summaries, key=self.mean)
        return best if self.stat(best) else None

    @property
    def probe(self) -> Summary | None:
        """The linear probe; the better one where several poolings were tried."""
        probes = [s for s in self.summaries if s.method == "linear_probe" and self.stat(s)]
        return max(probes, key=self.mean, default=None)


@dataclass(frozen=True)
class Column:
    """One column of the tables; `brief` ones are shown in the terminal too. Without any value it is left out.

    A header breaks where the terminal is to break it, so that the figures fit into 80 columns.
    """

    header: str
    cell: Callable[[Summary], str]
    brief: bool = True


def sections_of(summaries: Sequence[Summary]) -> list[Section]:
    """Summaries by (dataset, backbone); multi-label ones are compared by mean average precision."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.dataset, summary.backbone), []).append(summary)
    return [Section(*key, _metric(group), tuple(group)) for key, group in groups.items()]


def _metric(summaries: list[Summary]) -> Metric:
    multi_label = any(s.mean_average_precision for s in summaries) and not any(s.top1 for s in summaries)
    return "mean_average_precision" if multi_label else "top1"


def columns_of(section: Section) -> list[Column]:
    others: list[Metric] = [name for name in METRIC_NAMES if name != section.metric]
    columns = [
        Column(f"{METRIC_NAMES[section.metric]}\n%", lambda s: _percent(section.stat(s))),
        Column("error\n%", lambda s: _error(section.stat(s))),
        Column("trained", lambda s: f"{s.trainable_params:,}"),
        Column("head", lambda s: f"{s.head_params:,}"),
        Column("s\n/epoch", lambda s: _number(s.seconds_per_epoch)),
        Column("samples\n/s", lambda s: _number(s.samples_per_second)),
        Column("peak\nMiB", lambda s: _mebibytes(s.peak_memory_bytes)),
        Column("break\neven\nepochs", lambda s: _number(s.break_even_epochs)),
        *(_metric_column(metric) for metric in others),
        Column("extract\ns", lambda s: _number(s.extract_seconds), brief=False),
        Column("GFLOPs\n/image", lambda s: _number(s.inference_gflops), brief=False),
        Column("store\nMiB", lambda s: _mebibytes(s.store_bytes), brief=False),
        Column("seeds", lambda s: str(len(s.seeds)), brief=False),
    ]
    return [column for column in columns if any(column.cell(s) != UNKNOWN for s in section.summaries)]


def _metric_column(metric: Metric) -> Column:
    return Column(f"{METRIC_NAMES[metric]}\n%", lambda s: _percent(getattr(s, metric)), brief=False)


def _percent(stat: Stat | None) -> str:
    if stat is None:
        return UNKNOWN
    return f"{stat.mean:.2f}" if stat.std is None else f"{stat.mean:.2f} ± {stat.std:.2f}"


def _error(stat: Stat | None) -> str:
    return UNKNOWN if stat is None else f"{100 - stat.mean:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(n_bytes: int | None) -> str:
    return _number(None if n_bytes is None else n_bytes / 2**20)


def headline(section: Section) -> str:
    """What is best, and by how much it beats the linear probe."""
    best, probe = section.best, section.probe
    if best is None:
        return f"{section.dataset}: no method has a result."
    name = METRIC_NAMES[section.metric]
    line = f"{section.dataset}: best is {best.label}, {name} {_percent(section.stat(best))}"
    if probe is None:
        return f"{line} (no linear probe to compare with)."
    if probe == best:
        return f"{line}: no method beats the linear probe."
    gain, probe_error = section.mean(best) - section.mean(probe), 100 - section.mean(probe)
    ratio = f", {(probe_error - gain) / probe_error:.2f} times its error" if probe_error > 0 else ""
    return f"{line}: {gain:+.2f} points on the linear probe ({section.mean(probe):.2f}){ratio}."


def print_table(summaries: Sequence[Summary], console: Console) -> None:
    """One table and one line of conclusion for every dataset and backbone."""
    if not summaries:
        console.print("no results yet")
    for section in sections_of(summaries):
        columns = [column for column in columns_of(section) if column.brief]
        table = Table(title=Text(f"{section.dataset} · {section.backbone}"), box=box.SIMPLE, padding=0)
        table.add_column("method", overflow="fold")
        for column in columns:
            table.add_column(column.header, justify="right", no_wrap=True)
        for summary in section.summaries:  # Text, not str: a user's [brackets] are no markup
            style = "bold" if summary == section.best else ""
            table.add_row(Text(summary.label), *(Text(c.cell(summary)) for c in columns), style=style)
        console.print(table)
        console.print(Text(headline(section)))


def write_report(run_dir: str | Path, rows: Sequence[Row], config_text: str | None = None) -> Path:
    """`report.html` in the run directory; `config_text` is the resolved configuration, as YAML."""
    if not rows:
        raise UserError(f"no results to report in {run_dir}: run `sidecache run` first")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("adapt").joinpath("report.html.j2").read_text(encoding="utf-8"))
    shown = differing_options(rows)
    page = template.render(
        name=Path(run_dir).resolve().name,
        sections=sections_of(summarise(rows)),
        columns_of=columns_of,
        headline=headline,
        chart=chart,
        rows=[(label(row.method, row.options, shown[row.method]), row) for row in rows],
        config_text=config_text,
    )
    path = Path(run_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page + "\n")
    return path


def chart(section: Section) -> Markup:
    """Accuracy against trained parameters as an SVG element that takes its colours from the page."""
    known = [s for s in section.summaries if section.stat(s)]
    if not known:
        return Markup("")
    salt = f"{section.dataset} {section.backbone}"  # the same rows give the same bytes
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts have it
        figure = Figure(figsize=(7.2, 4.2), dpi=72, facecolor="none")  # 72: a pixel is a point
        axes = figure.add_axes((0.09, 0.13, 0.89, 0.83), facecolor="none")
        _draw(axes, section, known)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), f"{METRIC_NAMES[section.metric]} against trained parameters. {headline(section)}")


def _draw(axes: Axes, section: Section, known: list[Summary]) -> None:
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


def _marker_box(axes: Axes, x: float, y: float, spread: float) -> "Box":
    (left, bottom), (right, top) = axes.transData.transform([(x, y - spread), (x, y + spread)]).tolist()
    return Box(left - 4, bottom - 4, right + 4, top + 4)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 32 else f"{text[:31]}…"


def _draw_labels(axes: Axes, xs: list[float], ys: list[float], texts: list[str], taken: list["Box"]) -> None:
    """Each label at the nearest free place around its point."""
    anchors = axes.transData.transform(list(zip(xs, ys, strict=True))).tolist()
    taken = list(taken)
    frame = Box(*map(float, axes.bbox.extents))
    for (x, y), text in zip(anchors, texts, strict=True):
        place = place_label(x, y, POINTS_A_CHARACTER * len(text), frame, taken)
        taken.append(place)
        centre = ((place.left + place.right) / 2, (place.bottom + place.top) / 2)
        far = abs(centre[1] - y) > 1.4 * POINTS_A_LINE
        axes.annotate(
            text,
            (x, y),
            centre,
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            color=TEXT,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8} if far else None,
        )


@dataclass(frozen=True)
class Box:
    """A rectangle in points; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)

    def contains(self, other: "Box") -> bool:
        wide = self.left <= other.left and other.right <= self.right
        return wide and self.bottom <= other.bottom and other.top <= self.top


def place_label(x: float, y: float, width: float, frame: Box, taken: Sequence[Box]) -> Box:
    """The first free box beside, above or below a point, further and further away; else the one on its right."""
    for step in range(24):
        for dy in (step * POINTS_A_LINE / 2, -step * POINTS_A_LINE / 2):
            for left in (x - width / 2, x + 8, x - 8 - width):
                place = Box(left, y + dy - POINTS_A_LINE / 2, left + width, y + dy + POINTS_A_LINE / 2)
                if frame.contains(place) and not any(place.overlaps(other) for other in taken):
                    return place
    return Box(x + 8, y - POINTS_A_LINE / 2, x + 8 + width, y + POINTS_A_LINE / 2)


def _inline(svg: str, title: str) -> Markup:
    """The bare element: no XML prologue, no name spaces, ids only where something refers to them."""
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for colour, variable in CSS_COLOURS.items():
        body = body.replace(colour, variable)
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}"><title>{}</title>')
    return opening.format(view_box[1], title, title) + Markup(body)
