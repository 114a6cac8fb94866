"""Holds the plan of a job, and prints it for `sidecache plan`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from adapt.planning.proposals import Proposal
from store.console.duration import duration
from store.console.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fields of `sidecache plan --json`; None for what is unknown.

    Args:
        samples: rows of the store by split: samples, or views of videos, each of which has `views`. The split
            `augmented` holds random crops of the samples of `train`.
        bytes_per_sample: of one row, before compression.
        upper_bound: whether `store_bytes` is an upper bound, since the store is compressed.
        fits: whether the store fits the disk, and the budget if there is one.
        samples_to_extract: rows of the shards that the store lacks.
        method: the method whose training steps on features are timed.
        epoch_seconds: of training one trial, without validation, by feature source; `end_to_end` if a method of the
            job trains through the backbone.
        samples_per_second: the same as rates, and the rate of extraction as `extract`.
        break_even_epochs: epochs after which extracting once has cost less than online training.
        unstored_samples: rows by split that the store lacks; they go through the backbone once, at the end.
        unstored_seconds: of that; a part of `train_seconds`.
        trials: trainings of the job: the points of every search, and every method from every seed.
        train_seconds: of all trials from `feature_source`, as they share passes, with validation and test; what is
            solved counts as nothing.
        total_seconds: of extraction and training, by feature source that is possible.
        feature_source: the source that training will use, for this `reason`.
        proposals: smaller stores that fit, the largest first.
        notes: what is missing, or would stop the job.
    """

    samples: dict[str, int] | None
    views: int
    layers: tuple[int, ...]
    num_tokens: int
    dim: int
    dtype: str
    bytes_per_sample: int
    store_bytes: int | None
    upper_bound: bool
    free_bytes: int | None
    budget_bytes: int | None
    fits: bool | None
    samples_to_extract: int | None
    method: str
    extract_seconds: float | None
    epoch_seconds: dict[str, float | None]
    unstored_samples: dict[str, int] | None
    unstored_seconds: float | None
    samples_per_second: dict[str, float]
    break_even_epochs: float | None
    trials: int
    train_seconds: float | None
    total_seconds: dict[str, float | None]
    feature_source: str
    reason: str
    proposals: list[Proposal]
    notes: list[str]

    @property
    def recommendation(self) -> str:
        """Sentences: whether the store fits, or what would, and which features to train from."""
        return f"{self._space_sentence()} {self._source_sentence()}"

    @property
    def fastest(self) -> str | None:
        """The feature source with which the whole job takes the least time, of those that are possible and known."""
        known = {source: seconds for source, seconds in self.total_seconds.items() if seconds is not None}
        return min(known, key=lambda source: known[source], default=None)

    def document(self) -> dict[str, Any]:
        """The fields for JSON, with the recommendation."""
        return asdict(self) | {"fastest": self.fastest, "recommendation": self.recommendation}

    def _space_sentence(self) -> str:
        if self.feature_source == "online":
            return "Nothing is stored: train.feature_source is online."
        if self.store_bytes is None:
            size = self.bytes_per_sample
            budget = f"; {decimal(self.budget_bytes)} hold {self.budget_bytes // size:,}" if self.budget_bytes else ""
            return f"A store takes {decimal(size)} a sample, {decimal(1000 * size)} a thousand{budget}."
        limits = ", ".join(f"{decimal(n_bytes)} {name}" for n_bytes, name in self._limits()) or "not local"
        size_and_limits = f"{'at most ' if self.upper_bound else ''}{decimal(self.store_bytes)} ({limits})"
        if self.fits:
            return f"The store {'is complete' if self.samples_to_extract == 0 else 'fits'}: {size_and_limits}."
        alternative = "-o train.feature_source=online stores nothing"
        if self.proposals:
            first = self.proposals[0]
            overrides = " ".join(f"-o '{override}'" for override in first.overrides)
            alternative = f"{overrides} makes it {decimal(first.store_bytes)}, {alternative}"
        return f"The store does not fit: {size_and_limits}; {alternative}."

    def _limits(self) -> Iterator[tuple[int, str]]:
        """Numbers of bytes that the store may take, with their names."""
        if self.free_bytes is not None:
            yield self.free_bytes, "free"
        if self.budget_bytes is not None:
            yield self.budget_bytes, "of budget"

    def _source_sentence(self) -> str:
        online, cached = self.epoch_seconds["online"], self.epoch_seconds.get(self.feature_source)
        if self.feature_source == "online":
            return "Every epoch runs a forward pass for each of its samples."
        if self.feature_source == "auto":
            return f"Training uses resident or streamed features, depending on memory ({self.reason})."
        choice = f"Training uses {self.feature_source} features ({self.reason})"
        if online is None or cached is None or self.fastest is None:
            return f"{choice}."
        of_online, of_choice = (self.total_seconds.get(source) for source in ("online", self.feature_source))
        assert of_online is not None
        if of_choice is None:
            return f"{choice}; without a store the job takes {duration(of_online)}."
        whole = f"The whole job takes {duration(of_choice)} with them, and {duration(of_online)} without a store"
        advice = ": set train.feature_source to online" if self.fastest == "online" else ""
        return f"{choice}. {whole}{advice}."


def print_plan(plan: Plan, title: str) -> None:
    """Print a plan on standard output: a table, proposals, the recommendation and notes."""
    table = Table(title=title, show_header=False)
    for name, value in _lines(plan):
        table.add_row(name, value)
    console = Terminal()
    console.print(table)
    if plan.proposals:
        console.print(_proposal_table(plan.proposals))
    for text in (plan.recommendation, *(f"Note: {note}" for note in plan.notes)):
        console.print(text, highlight=False)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    samples = "unknown" if plan.samples is None else ", ".join(f"{n:,} {split}" for split, n in plan.samples.items())
    yield "samples", samples + (f" (views; {plan.views} of every video)" if plan.views > 1 else "")
    yield "stored", f"{len(plan.layers)} layers x {plan.num_tokens:,} tokens x {plan.dim:,} {plan.dtype} values"
    yield "bytes a sample", f"{plan.bytes_per_sample:,} ({decimal(1000 * plan.bytes_per_sample)} a thousand)"
    if plan.store_bytes is not None:
        yield "bytes of the store", f"{'at most ' if plan.upper_bound else ''}{plan.store_bytes:,}"
    for n_bytes, name in plan._limits():
        yield f"bytes {name}", f"{n_bytes:,}"
    if plan.extract_seconds is not None:
        yield "extraction", f"{duration(plan.extract_seconds)} for {plan.samples_to_extract:,} samples"
    elif "extract" in plan.samples_per_second:
        yield "extraction", _rate(plan.samples_per_second["extract"])
    yield from _unstored_lines(plan)
    for source, seconds in plan.epoch_seconds.items():
        is_possible = not plan.total_seconds or source in (*plan.total_seconds, "end_to_end")
        if source in plan.samples_per_second and is_possible:
            an_epoch = "" if seconds is None else f"{duration(seconds)} an epoch, "
            yield f"training, {source}", f"{an_epoch}{_rate(plan.samples_per_second[source])}"
    total = "" if plan.train_seconds is None else f"{duration(plan.train_seconds)} for "
    yield "training, all", f"{total}{plan.trials:,} trials"
    for source, seconds in plan.total_seconds.items():
        if seconds is not None:
            yield f"whole job, {source}", duration(seconds)
    if plan.break_even_epochs is not None:
        yield "break-even", f"{plan.break_even_epochs:.1f} epochs"


def _unstored_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    for split, n_samples in (plan.unstored_samples or {}).items():
        seconds = "" if plan.unstored_seconds is None else f", {duration(plan.unstored_seconds)}"
        yield f"{split}, not stored", f"{n_samples:,} samples go through the backbone once{seconds}"


def _proposal_table(proposals: list[Proposal]) -> Table:
    table = Table("what fits", "store", "points lost, where the class is a matter of (docs/storage.md)")
    for proposal in proposals:
        table.add_row(", ".join(proposal.overrides), decimal(proposal.store_bytes), proposal.cost)
    return table


def _rate(samples_per_second: float) -> str:
    if samples_per_second < 1:
        return f"{duration(1 / samples_per_second)} a sample"
    return f"{samples_per_second:,.1f} samples/s"
