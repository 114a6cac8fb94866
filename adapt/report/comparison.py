"""The methods that can be compared with one another: those of one dataset and backbone, judged by the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapt.report.seed_averages import Metric, Stat, Summary, differing, pairs

METRIC_NAMES: dict[Metric, str] = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class",
    "macro_f1": "macro F1",
    "mean_average_precision": "mAP",
}
UNKNOWN = "–"


@dataclass(frozen=True)
class Comparison:
    """All groups of one dataset and backbone, and the metric they are compared by.

    `judged_by` says what samples and score these are, where others of the same dataset and backbone had others.
    """

    dataset: str
    backbone: str
    judged_by: str
    metric: Metric
    summaries: tuple[Summary, ...]

    @property
    def title(self) -> str:
        """What stands above the table."""
        return " · ".join(text for text in (self.dataset, self.backbone, self.judged_by) if text)

    def stat(self, summary: Summary) -> Stat | None:
        stat: Stat | None = getattr(summary, self.metric)
        return stat

    def mean(self, summary: Summary) -> float:
        """Of a summary whose metric is known."""
        stat = self.stat(summary)
        assert stat is not None
        return stat.mean

    @property
    def best(self) -> Summary | None:
        """What validation puts first: who chose by the test split would report the luckiest."""
        return self._best_of(self.summaries)

    @property
    def probe(self) -> Summary | None:
        """The linear probe; of several poolings the one that validation puts first."""
        return self._best_of([s for s in self.summaries if s.method == "linear_probe"])

    def _best_of(self, summaries: Sequence[Summary]) -> Summary | None:
        """The first of equals."""
        return max((s for s in summaries if self.stat(s)), key=_validation, default=None)


def _validation(summary: Summary) -> float:
    return float("-inf") if summary.val_score is None else summary.val_score.mean


def sections_of(summaries: Sequence[Summary]) -> list[Comparison]:
    """Summaries by (dataset, backbone, what they are judged by); multi-label ones are compared by average precision."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.dataset, summary.backbone), []).append(summary)
    return [section for key, group in groups.items() for section in _sections_of_dataset(*key, group)]


def _sections_of_dataset(dataset: str, backbone: str, summaries: list[Summary]) -> list[Comparison]:
    shown = differing(summary.judged_by for summary in summaries)
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(" ".join(pairs(summary.judged_by, shown)), []).append(summary)
    return [Comparison(dataset, backbone, key, _metric(group), tuple(group)) for key, group in groups.items()]


def _metric(summaries: list[Summary]) -> Metric:
    multi_label = any(s.mean_average_precision for s in summaries) and not any(s.top1 for s in summaries)
    return "mean_average_precision" if multi_label else "top1"


def percent(stat: Stat | None) -> str:
    """Mean and deviation, as far as they are known."""
    if stat is None:
        return UNKNOWN
    return f"{stat.mean:.2f}" if stat.std is None else f"{stat.mean:.2f} ± {stat.std:.2f}"


def headline(section: Comparison) -> str:
    """What is best on validation, and by how much it beats the linear probe on the test split."""
    best, probe = section.best, section.probe
    what = f"{section.dataset} ({section.judged_by})" if section.judged_by else section.dataset
    if best is None:
        return f"{what}: no method has a result."
    name = METRIC_NAMES[section.metric]
    line = f"{what}: best on validation is {best.label}, {name} {percent(section.stat(best))}"
    if probe is None:
        return f"{line} (no linear probe to compare with)."
    if probe == best:
        return f"{line}: no method beats the linear probe there."
    gain, probe_error = section.mean(best) - section.mean(probe), 100 - section.mean(probe)
    ratio = f", {(probe_error - gain) / probe_error:.2f} times its error" if probe_error > 0 else ""
    return f"{line}: {gain:+.2f} points on the linear probe ({section.mean(probe):.2f}){ratio}."
