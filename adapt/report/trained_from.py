"""Tells methods that are trained from the cache from those that are trained end to end, in tables and charts."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from adapt.report.seed_averages import Summary
from adapt.report.svg import CACHE, END_TO_END, ONLINE


@dataclass(frozen=True, kw_only=True)
class TrainedFrom:
    """What a method is trained from, and its mark: a color and a shape.

    Args:
        key: names it in the page.
        name: for readers.
        color: a placeholder of `adapt.report.svg`.
        marker: the shape for matplotlib.
        path: the same shape as an SVG path of 10 x 10.
    """

    key: str
    name: str
    color: str
    marker: str
    path: str

    @property
    def icon(self) -> Markup:
        """The mark as an element of the page."""
        return Markup(
            f'<svg class="mark {self.key}" viewBox="0 0 10 10" aria-hidden="true"><path d="{self.path}"/></svg>'
        )


FROM_CACHE = TrainedFrom(
    key="cache", name="from the cache", color=CACHE, marker="o", path="M1 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
)
FROM_IMAGES = TrainedFrom(key="end-to-end", name="end to end", color=END_TO_END, marker="s", path="M1.5 1.5h7v7h-7z")
FROM_ONLINE = TrainedFrom(key="online", name="frozen, online", color=ONLINE, marker="^", path="M5 1L9.2 9H.8z")
_ALL = (FROM_CACHE, FROM_ONLINE, FROM_IMAGES)


def trained_from(summary: Summary) -> TrainedFrom:
    """What a method is trained from."""
    source = summary.rows[0].feature_source
    if source.endswith("images"):
        return FROM_IMAGES
    return FROM_ONLINE if source == "online" else FROM_CACHE


def kinds_of(summaries: Sequence[Summary]) -> list[TrainedFrom]:
    """What any of the methods is trained from, in the order of legends."""
    found = {trained_from(summary).key for summary in summaries}
    return [kind for kind in _ALL if kind.key in found]
