"""Compares methods with one another: those of one data set and backbone that were evaluated in the same way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapt.report.evidence import Evidence, Key, ReadPredictions, evidence_of, no_predictions
from adapt.report.seed_averages import Stat, Summary, differing, name_value_pairs
from adapt.run_dir.results import COLUMNS

UNKNOWN = "–"
INSIDE_NOISE = "≈"
TEST_NAME = "paired bootstrap test, level 0.05, Holm"
INTERVAL_LEGEND = "95 % CI: bootstrap over the test samples"
NOISE_LEGEND = f"{INSIDE_NOISE} inside the noise of the best on validation ({TEST_NAME})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods of one data set and backbone that can be compared.

    Args:
        protocol: the samples and the score, if the data set and backbone were evaluated in several ways; else empty.
        metric: the field of `Row` by which the methods are compared.
        evidence: intervals and tests, by `Summary.trial_ids`, of the methods that have predictions.
    """

    dataset: str
    backbone: str
    protocol: str
    metric: str
    summaries: tuple[Summary, ...]
    evidence: Mapping[Key, Evidence] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The title of the table."""
        return " · ".join(text for text in (self.dataset, self.backbone, self.protocol) if text)

    @property
    def metric_name(self) -> str:
        """The name of the metric in headers and sentences."""
        return COLUMNS[self.metric].name

    def stat(self, summary: Summary) -> Stat | None:
        """The metric of a method; None where it is undefined."""
        return summary.metrics[self.metric]

    def mean(self, summary: Summary) -> float:
        """The mean of the metric, of a method for which it is defined."""
        stat = self.stat(summary)
        assert stat is not None
        return stat.mean

    @property
    def most_seeds(self) -> int:
        """The number of seeds of the method that has most."""
        return max(len(summary.seeds) for summary in self.summaries)

    def seeds_note(self, summary: Summary) -> str:
        """`n=1` for a method of one seed, and so on; empty where all methods have equally many seeds."""
        counts = {len(other.seeds) for other in self.summaries}
        return f"n={len(summary.seeds)}" if len(counts) > 1 else ""

    def is_inside_noise(self, summary: Summary) -> bool | None:
        """Whether the test samples cannot tell a method from the best one on validation; None if that is unknown."""
        found = self.evidence.get(summary.trial_ids)
        if found is None or (found.p_value is None and summary != self.best):
            return None
        return found.is_inside_noise

    @property
    def best(self) -> Summary | None:
        """The best method on validation: the best one on the test split may only be the luckiest."""
        return self._best_of(self.summaries)

    @property
    def by_validation(self) -> list[Summary]:
        """The methods that have a result, the best one on validation first."""
        return sorted((s for s in self.summaries if self.stat(s)), key=_validation, reverse=True)

    @property
    def probe(self) -> Summary | None:
        """The linear probe; of several, the best one on validation."""
        return self._best_of([s for s in self.summaries if s.method == "linear_probe"])

    def _best_of(self, summaries: Sequence[Summary]) -> Summary | None:
        """The best on validation; of equal ones the first."""
        return max((s for s in summaries if self.stat(s)), key=_validation, default=None)


def _validation(summary: Summary) -> float:
    score = summary.metrics["val_score"]
    return float("-inf") if score is None else score.mean


def comparisons_of(summaries: Sequence[Summary], read: ReadPredictions = no_predictions) -> list[Comparison]:
    """Summaries by data set, backbone and protocol.

    Args:
        summaries: methods of any number of data sets and backbones.
        read: gives the predictions of a row, which intervals and tests are computed from.

    Raises:
        UserError: predictions are damaged, or those of a comparison are not of the same samples.
    """
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.dataset, summary.backbone), []).append(summary)
    comparisons = [comparison for group in groups.values() for comparison in _comparisons_of_dataset(group)]
    return [_with_evidence(comparison, read) for comparison in comparisons]


def _with_evidence(comparison: Comparison, read: ReadPredictions) -> Comparison:
    if (best := comparison.best) is None:
        return comparison
    return replace(comparison, evidence=evidence_of(comparison.summaries, comparison.metric, best, read))


def _comparisons_of_dataset(summaries: list[Summary]) -> list[Comparison]:
    """One comparison a protocol, of summaries of one data set and backbone."""
    names = differing(summary.protocol for summary in summaries)
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(" ".join(name_value_pairs(summary.protocol, names)), []).append(summary)
    return [
        Comparison(
            dataset=group[0].dataset,
            backbone=group[0].backbone,
            protocol=protocol,
            metric=_metric(group),
            summaries=tuple(group),
        )
        for protocol, group in groups.items()
    ]


def _metric(summaries: list[Summary]) -> str:
    """What validation maximizes: average precision for multi-label data, else an accuracy (see `Metrics.score`)."""
    has_top1 = any(s.metrics["top1"] for s in summaries)
    has_average_precision = any(s.metrics["mean_average_precision"] for s in summaries)
    if has_average_precision and not has_top1:
        return "mean_average_precision"
    return "mean_class_accuracy" if summaries[0].protocol.get("balance_classes") is True else "top1"


def percent(stat: Stat | None) -> str:
    """Mean and deviation, as far as they are known."""
    if stat is None:
        return UNKNOWN
    return f"{stat.mean:.2f}" if stat.std is None else f"{stat.mean:.2f} ± {stat.std:.2f}"


def headline(comparison: Comparison) -> str:
    """One sentence: the best method on validation, and its lead over the linear probe on the test split."""
    best, probe = comparison.best, comparison.probe
    subject = comparison.dataset
    if comparison.protocol:
        subject += f" ({comparison.protocol})"
    if best is None:
        return f"{subject}: no method has a result."
    note = comparison.seeds_note(best)
    line = f"{subject}: best on validation is {best.label}, {comparison.metric_name} {percent(comparison.stat(best))}"
    line += f" ({note})" if note else ""
    if probe is None:
        return f"{line} (no linear probe to compare with)."
    if probe == best:
        return f"{line}: no method beats the linear probe there."
    probe_mean = comparison.mean(probe)
    gain, probe_error = comparison.mean(best) - probe_mean, 100 - probe_mean
    ratio = f", {(probe_error - gain) / probe_error:.2f} times its error" if probe_error > 0 else ""
    return f"{line}: {gain:+.2f} points on the linear probe ({probe_mean:.2f}){ratio}{_surety(comparison, probe)}."


def _surety(comparison: Comparison, probe: Summary) -> str:
    """Whether the difference between the best method and the linear probe is inside the noise, where that is known."""
    found = comparison.evidence.get(probe.trial_ids)
    if found is None or found.p_value is None:
        return ""
    side = "inside" if found.is_inside_noise else "outside"
    return f"; this is {side} the noise of the test samples (p = {found.p_value:.2g})"


def interval_text(comparison: Comparison, summary: Summary) -> str:
    """The interval of a method, marked if the method is inside the noise of the best one; a dash if it is unknown."""
    found = comparison.evidence.get(summary.trial_ids)
    if found is None:
        return UNKNOWN
    mark = f" {INSIDE_NOISE}" if found.is_inside_noise else ""
    return f"{found.interval.low:.1f}–{found.interval.high:.1f}{mark}"


def legend(comparison: Comparison) -> list[str]:
    """Lines that explain interval and mark; none if no method has them."""
    is_marked = any(found.is_inside_noise for found in comparison.evidence.values())
    return [INTERVAL_LEGEND] * bool(comparison.evidence) + [NOISE_LEGEND] * is_marked
