"""Turns a matplotlib figure into SVG: a file of its own, or an element that takes its colors from an HTML page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from store.console.visible import visible

# Placeholders for CSS variables of the page, so that one drawing works in light and dark mode.
TEXT, ACCENT, RULE, MUTED = "#010203", "#040506", "#070809", "#0a0b0c"
CACHE, END_TO_END, ONLINE = "#0b0102", "#0b0304", "#0b0506"
_IN_PAGE = {
    TEXT: "currentColor",
    ACCENT: "var(--accent)",
    RULE: "var(--rule)",
    MUTED: "var(--muted)",
    CACHE: "var(--cache)",
    END_TO_END: "var(--end-to-end)",
    ONLINE: "var(--online)",
}
# Colors of a file, which are legible on white and on dark gray.
_IN_FILE = {TEXT: "#6e7781", ACCENT: "#3f86d1", RULE: "#8c959f55", MUTED: "#8c959f"}


@contextmanager
def svg_style(salt: str, font_size: float = 9.0) -> Iterator[None]:
    """The style of all figures.

    Args:
        salt: ids in the SVG are hashes with it, so that the same figure gives the same bytes.
        font_size: in points.
    """
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": visible(salt), "font.size": font_size}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts have it
        yield


def svg_element(figure: Figure, title: str) -> Markup:
    """A figure as an element of a page: no XML prologue, no name spaces, no ids of groups."""
    svg = _save(figure)
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}"><title>{}</title>')
    return opening.format(view_box[1], title, title) + Markup(_colored(body, _IN_PAGE))


def svg_file(figure: Figure) -> str:
    """A figure as the content of a file."""
    return _colored(_save(figure), _IN_FILE)


def _save(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _colored(svg: str, colors: dict[str, str]) -> str:
    for placeholder, color in colors.items():
        svg = svg.replace(placeholder, color)
    return svg
