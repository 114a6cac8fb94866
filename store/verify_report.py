"""Defines and prints the report of `sidecache verify`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from store.console.terminal import Terminal
from store.console.visible import one_line


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A committed shard that is damaged, in one layer or in all of them.

    Attributes:
        layer: None for all layers.
        rows: the first row, and one past the last.
    """

    split: str
    layer: int | None
    shard: int
    rows: tuple[int, int]
    file: str
    reason: str


@dataclass
class Report:
    """What was found in a store.

    Attributes:
        complete: every shard is committed.
        bytes_read: of values and documents, before compression.
        damaged: repaired by extracting these shards again.
        faults: damage of everything else: metadata, labels, ids.
        notes: oddities that do no harm.
    """

    store: str
    complete: bool = False
    bytes_read: int = 0
    damaged: list[Damage] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged; an incomplete store may be ok."""
        return not self.damaged and not self.faults

    def document(self) -> dict[str, Any]:
        """The report as one JSON document."""
        fields = asdict(self)
        damaged = [{**damage, "rows": list(damage["rows"])} for damage in fields["damaged"]]
        return {"store": self.store, "ok": self.ok, **fields, "damaged": damaged}


def damaged_shards(report: Report) -> dict[str, list[int]]:
    """Split -> its damaged shards, as `StoreWriter.unmark` takes them."""
    splits = sorted({damage.split for damage in report.damaged})
    return {name: sorted({damage.shard for damage in report.damaged if damage.split == name}) for name in splits}


def print_report(report: Report) -> None:
    """Print the report on standard output, a line for every finding."""
    lines = [
        f"damaged: shard {damage.shard} of {damage.split} (rows {damage.rows[0]} to {damage.rows[1] - 1}), "
        f"{'all layers' if damage.layer is None else f'layer {damage.layer}'}: {damage.file}: {damage.reason}"
        for damage in report.damaged
    ]
    lines += [f"fault: {text}" for text in report.faults] + [f"note: {text}" for text in report.notes]
    findings = "sound" if report.ok else f"{len(report.damaged)} damaged files, {len(report.faults)} faults"
    state = "complete" if report.complete else "incomplete, `sidecache extract` finishes it"
    lines.append(f"{report.store}: {findings}; {state}; {report.bytes_read:,} bytes read")
    console = Terminal(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(one_line(line), style="red" if line.startswith(("damaged:", "fault:")) else None)
