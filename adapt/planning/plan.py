"""What a job will cost, as `sidecache plan` tells it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from adapt.planning.proposals import Proposal
from store.console.terminal import Terminal


@dataclass(frozen=True)
class Plan:
    """What `sidecache plan --json` prints; None where it cannot be known.

    Args:
        samples: rows of the store by split: samples, or views of videos, of which each has `views`.
        bytes_per_sample: of one row, before compression.
        upper_bound: whether `store_bytes` is what an uncompressed store would take.
        samples_to_extract: rows of shards that the store lacks.
        fits: whether the store fits the disk, and the budget where one is given.
        method: whose steps `epoch_seconds` counts, from features.
        epoch_seconds: of training one trial, validation left out, by feature source; `end_to_end` where a method of
            the job is so trained.
        samples_per_second: the same as rates, and that of extraction as `extract`.
        break_even_epochs: epochs after which extracting once has cost less than online training.
        feature_source: what training will take, for this `reason`.
        proposals: smaller stores that fit, the least harmful first.
        notes: what is missing, or will stop the job.
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
    samples_per_second: dict[str, float]
    break_even_epochs: float | None
    feature_source: str
    reason: str
    proposals: list[Proposal]
    notes: list[str]

    @property
    def recommendation(self) -> str:
        """Whether it fits, else what would, and which features to train from."""
        return f"{self._about_space()} {self._about_source()}"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"recommendation": self.recommendation}

    def _about_space(self) -> str:
        if self.feature_source == "online":
            return "Nothing is stored: train.feature_source is online."
        if self.store_bytes is None:
            size = self.bytes_per_sample
            held = f"; {decimal(self.budget_bytes)} hold {self.budget_bytes // size:,}" if self.budget_bytes else ""
            return f"A store takes {decimal(size)} a sample, {decimal(1000 * size)} a thousand{held}."
        room = [f"{decimal(n)} {name}" for n, name in self._room()]
        size_of = (
            f"{'at most ' if self.upper_bound else ''}{decimal(self.store_bytes)} ({', '.join(room) or 'not local'})"
        )
        if self.fits:
            return f"The store {'is complete' if self.samples_to_extract == 0 else 'fits'}: {size_of}."
        instead = "-o train.feature_source=online stores nothing"
        if self.proposals:
            least = self.proposals[0]
            overrides = " ".join(f"-o '{override}'" for override in least.overrides)
            instead = f"{overrides} makes it {decimal(least.store_bytes)}, {instead}"
        return f"The store does not fit: {size_of}; {instead}."

    def _room(self) -> Iterator[tuple[int, str]]:
        if self.free_bytes is not None:
            yield self.free_bytes, "free"
        if self.budget_bytes is not None:
            yield self.budget_bytes, "of budget"

    def _about_source(self) -> str:
        online, cached = self.epoch_seconds["online"], self.epoch_seconds.get(self.feature_source)
        if self.feature_source == "online":
            return "Every epoch pays a forward pass for each of its samples."
        if self.feature_source == "auto":
            return f"Resident or streamed features: memory will decide ({self.reason})."
        takes = f"Training takes {self.feature_source} features ({self.reason})"
        if online is None or cached is None:
            return f"{takes}."
        if self.break_even_epochs is None:
            times = f"{_duration(online)} against {_duration(cached)}"
            return f"An online epoch is no longer than one from {self.feature_source} features ({times}): train online."
        return f"{takes}; they have paid for themselves after {self.break_even_epochs:.1f} epochs of online training."


def print_plan(plan: Plan, title: str) -> None:
    """The plan as a table, and what it recommends, on standard output."""
    table = Table(title=title, show_header=False)
    for key, value in _lines(plan):
        table.add_row(key, value)
    console = Terminal()
    console.print(table)
    if plan.proposals:
        console.print(_table_of(plan.proposals))
    for text in (plan.recommendation, *(f"Note: {note}" for note in plan.notes)):
        console.print(text, highlight=False)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    samples = "unknown" if plan.samples is None else ", ".join(f"{n:,} {split}" for split, n in plan.samples.items())
    yield "samples", samples + (f" (views; {plan.views} of every video)" if plan.views > 1 else "")
    yield "stored", f"{len(plan.layers)} layers x {plan.num_tokens:,} tokens x {plan.dim:,} {plan.dtype} values"
    yield "bytes a sample", f"{plan.bytes_per_sample:,} ({decimal(1000 * plan.bytes_per_sample)} a thousand)"
    if plan.store_bytes is not None:
        yield "bytes of the store", f"{'at most ' if plan.upper_bound else ''}{plan.store_bytes:,}"
    for n_bytes, name in plan._room():
        yield f"bytes {name}", f"{n_bytes:,}"
    if plan.extract_seconds is not None:
        yield "extraction", f"{_duration(plan.extract_seconds)} for {plan.samples_to_extract:,} samples"
    elif "extract" in plan.samples_per_second:
        yield "extraction", _rate(plan.samples_per_second["extract"])
    for source, seconds in plan.epoch_seconds.items():
        if source in plan.samples_per_second:
            took = "" if seconds is None else f"{_duration(seconds)} an epoch, "
            yield f"training, {source}", f"{took}{_rate(plan.samples_per_second[source])}"
    if plan.break_even_epochs is not None:
        yield "break-even", f"{plan.break_even_epochs:.1f} epochs"


def _table_of(proposals: list[Proposal]) -> Table:
    table = Table("what fits, least harm expected first", "store", "known of its cost")
    for proposal in proposals:
        table.add_row(", ".join(proposal.overrides), decimal(proposal.store_bytes), "; ".join(proposal.costs))
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _rate(samples_per_second: float) -> str:
    if samples_per_second < 1:
        return f"{_duration(1 / samples_per_second)} a sample"
    return f"{samples_per_second:,.1f} samples/s"
