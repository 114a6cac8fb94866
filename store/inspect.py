"""Describes a store for `sidecache inspect`."""

from typing import Any

from rich.table import Table

from store.console.terminal import Terminal
from store.console.visible import one_line
from store.reader import Store

_MOST_IDS = 10  # of skipped samples, in a table


def describe_store(store: Store) -> dict[str, Any]:
    """Contents, completeness and provenance of a store as one JSON document."""
    schema = store.schema
    splits = {
        split: {
            "num_samples": store.num_samples(split),
            "shards": len(schema.shards(split)),
            "missing_shards": store.missing_shards(split),
            "skipped": store.skipped(split),
            "validation": _count_validation(store, split),
        }
        for split in store.splits
    }
    return {
        "url": store.url,
        "complete": not any(split["missing_shards"] for split in splits.values()),
        "dataset": schema.dataset,
        "classes": list(schema.classes),
        "multi_label": schema.multi_label,
        "val_split": schema.val_split or None,
        "layers": list(schema.layers),
        "num_tokens": schema.token_layout.num_tokens,
        "num_prefix_tokens": schema.num_prefix_tokens,
        "num_class_tokens": schema.num_class_tokens,
        "grid": list(schema.grid),
        "dim": schema.dim,
        "dtype": schema.dtype,
        "bytes_per_sample": schema.bytes_per_sample,
        "store_bytes": store.n_bytes(),
        "extract_seconds": store.log.get("extract_seconds"),
        "splits": splits,
        "libraries": dict(schema.libraries),
        "provenance": schema.provenance.model_dump(mode="json"),
    }


def _count_validation(store: Store, split: str) -> int | None:
    """The number of a split's samples that the source itself sets apart for validation; None if it does not."""
    rows = store.validation_rows() if store.schema.marks_validation(split) else None
    return None if rows is None else len(rows)


def print_store(description: dict[str, Any]) -> None:
    """Print a description from `describe_store` as a table on standard output."""
    table = Table(title=one_line(description["url"]), show_header=False)
    for key, value in description.items():
        if key not in ("url", "splits", "provenance"):
            table.add_row(
                key, f"{value:,}" if isinstance(value, int) and key.endswith("bytes") else one_line(str(value))
            )
    for split, facts in description["splits"].items():
        missing, skipped = len(facts["missing_shards"]), len(facts["skipped"])
        validation = f" ({facts['validation']:,} of them for validation)" if facts["validation"] else ""
        table.add_row(
            f"split {one_line(split)}",
            f"{facts['num_samples']:,} samples{validation}, {missing} of {facts['shards']} shards missing, "
            f"{skipped} skipped",
        )
        if ids := list(facts["skipped"]):
            more = f", and {len(ids) - _MOST_IDS:,} more (--json lists all)" if len(ids) > _MOST_IDS else ""
            table.add_row(f"skipped in {one_line(split)}", ", ".join(map(one_line, ids[:_MOST_IDS])) + more)
    for key, value in description["provenance"].items():
        table.add_row(f"provenance.{key}", one_line(str(value)))
    Terminal().print(table)
