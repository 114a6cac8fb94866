"""Ranks methods over data sets, and counts wins, losses and ties of every method against every other."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from scipy.stats import rankdata

from adapt.across_runs.table import Cell, Table
from adapt.report.bootstrap import ALPHA
from adapt.report.comparison import TEST_NAME, Comparison
from adapt.report.evidence import ReadPredictions, ResampledMethods
from adapt.report.seed_averages import Summary
from store.errors import UserError

_OUTCOMES = ("wins", "losses", "ties", "untested")
Outcomes = dict[tuple[str, str], Counter[str]]  # of the first method against the second


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Ranks and outcomes over the data sets that have all methods.

    Args:
        methods: labels of the methods.
        mean_ranks: by method; 1 is best, and equal results share the mean of their ranks.
        outcomes: how often a method wins, loses or ties against another; a tie is a difference inside the noise.
        datasets: titles of the comparisons that were ranked.
        left_out: for those that were not, which method has no result there.
    """

    methods: tuple[str, ...]
    mean_ranks: dict[str, float]
    outcomes: Outcomes
    datasets: tuple[str, ...]
    left_out: tuple[str, ...]


def rank(comparisons: Sequence[Comparison], read: ReadPredictions) -> Ranking:
    """Rank the methods of comparisons.

    Args:
        comparisons: each is one data set, with one backbone and protocol.
        read: gives the predictions of a row; without them a pair counts as untested.

    Raises:
        UserError: there are fewer than two methods, or no data set has all of them.
    """
    methods = tuple(dict.fromkeys(summary.label for comparison in comparisons for summary in comparison.summaries))
    if len(methods) < 2:
        raise UserError(f"--rank needs two methods or more; there is {', '.join(methods)}")
    of_datasets = {comparison.title: _with_result(comparison) for comparison in comparisons}
    missing = {title: [method for method in methods if method not in of_datasets[title]] for title in of_datasets}
    ranked = [comparison for comparison in comparisons if not missing[comparison.title]]
    left_out = tuple(f"{title} (without {', '.join(names)})" for title, names in missing.items() if names)
    if not ranked:
        raise UserError(
            f"--rank: no data set has all methods: {'; '.join(left_out)}; choose methods that one has with --where"
        )
    ranks = [_ranks(comparison, methods, of_datasets[comparison.title]) for comparison in ranked]
    outcomes: Outcomes = {pair: Counter() for pair in permutations(methods, 2)}
    for comparison in ranked:
        _count(outcomes, comparison, read)
    return Ranking(
        methods=methods,
        mean_ranks={method: statistics.fmean(of_dataset[method] for of_dataset in ranks) for method in methods},
        outcomes=outcomes,
        datasets=tuple(comparison.title for comparison in ranked),
        left_out=left_out,
    )


def rank_table(ranking: Ranking) -> Table:
    """Methods by their mean rank, with wins, losses and ties in all and against every other method."""
    methods = sorted(ranking.methods, key=lambda method: ranking.mean_ranks[method])
    best = ranking.mean_ranks[methods[0]]
    rows = []
    for method in methods:
        against = {other: ranking.outcomes[method, other] for other in methods if other != method}
        rows.append(
            (
                Cell(method),
                Cell(f"{ranking.mean_ranks[method]:.2f}", is_best=ranking.mean_ranks[method] == best),
                Cell(_text(sum(against.values(), Counter()))),
                *(Cell(_text(against[other]) if other in against else "") for other in methods),
            )
        )
    n_untested = sum(count["untested"] for count in ranking.outcomes.values()) // 2
    untested = (f"{n_untested} pairs are untested: a trial of theirs has no predictions",) if n_untested else ()
    return Table(
        title=f"mean rank over {len(ranking.datasets)} data sets: {', '.join(ranking.datasets)}",
        header=("method", "mean\nrank", "all", *(f"against\n{method}" for method in methods)),
        n_names=1,
        rows=tuple(rows),
        legend=(f"wins-losses-ties on test data; a tie is a difference inside the noise ({TEST_NAME})", *untested),
        records=tuple(_record(ranking, *pair) for pair in permutations(methods, 2)),
    )


def _with_result(comparison: Comparison) -> dict[str, Summary]:
    """The methods of a comparison whose metric is defined, by label."""
    return {summary.label: summary for summary in comparison.summaries if comparison.stat(summary)}


def _ranks(comparison: Comparison, methods: Sequence[str], summaries: dict[str, Summary]) -> dict[str, float]:
    errors = [round(100 - comparison.mean(summaries[method]), 9) for method in methods]
    return dict(zip(methods, map(float, rankdata(errors)), strict=True))


def _count(outcomes: Outcomes, comparison: Comparison, read: ReadPredictions) -> None:
    """Add the outcomes of one data set."""
    pairs = list(combinations(comparison.summaries, 2))
    resampled = ResampledMethods(comparison.summaries, comparison.metric, read, n_pairs=len(pairs))
    p_values = resampled.test_pairs([(a.trial_ids, b.trial_ids) for a, b in pairs])
    for a, b in pairs:
        p_value, gain = p_values.get((a.trial_ids, b.trial_ids)), comparison.mean(a) - comparison.mean(b)
        if p_value is None or p_value > ALPHA:
            of_a = of_b = "untested" if p_value is None else "ties"
        else:
            of_a, of_b = ("wins", "losses") if gain > 0 else ("losses", "wins")
        outcomes[a.label, b.label][of_a] += 1
        outcomes[b.label, a.label][of_b] += 1


def _text(counts: Counter[str]) -> str:
    return "-".join(str(counts[outcome]) for outcome in _OUTCOMES[:3])


def _record(ranking: Ranking, method: str, other: str) -> dict[str, Any]:
    counts = ranking.outcomes[method, other]
    return {
        "method": method,
        "mean_rank": ranking.mean_ranks[method],
        "other": other,
        **{outcome: counts[outcome] for outcome in _OUTCOMES},
    }
