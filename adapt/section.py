"""The methods that can be compared with one another: those of one dataset and backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapt.results import Metric, Stat, Summary

METRIC_NAMES: dict[Metric, str] = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class",
    "macro_f1": "macro F1",
    "mean_average_precision": "mAP",
}
UNKNOWN = "–"


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


def sections_of(summaries: Sequence[Summary]) -> list[Section]:
    """Summaries by (dataset, backbone); multi-label ones are compared by mean average precision."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.dataset, summary.backbone), []).append(summary)
    return [Section(*key, _metric(group), tuple(group)) for key, group in groups.items()]


def _metric(summaries: list[Summary]) -> Metric:
    multi_label = any(s.mean_average_precision for s in summaries) and not any(s.top1 for s in summaries)
    return "mean_average_precision" if multi_label else "top1"


def percent(stat: Stat | None) -> str:
    """Mean and deviation, as far as they are known."""
    if stat is None:
        return UNKNOWN
    return f"{stat.mean:.2f}" if stat.std is None else f"{stat.mean:.2f} ± {stat.std:.2f}"


def headline(section: Section) -> str:
    """What is best, and by how much it beats the linear probe."""
    best, probe = section.best, section.probe
    if best is None:
        return f"{section.dataset}: no method has a result."
    name = METRIC_NAMES[section.metric]
    line = f"{section.dataset}: best is {best.label}, {name} {percent(section.stat(best))}"
    if probe is None:
        return f"{line} (no linear probe to compare with)."
    if probe == best:
        return f"{line}: no method beats the linear probe."
    gain, probe_error = section.mean(best) - section.mean(probe), 100 - section.mean(probe)
    ratio = f", {(probe_error - gain) / probe_error:.2f} times its error" if probe_error > 0 else ""
    return f"{line}: {gain:+.2f} points on the linear probe ({section.mean(probe):.2f}){ratio}."
