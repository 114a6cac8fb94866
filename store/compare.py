"""Compares a store with what a job expects, and refuses the job where they differ, naming every difference.

Fields are compared as pairs (stored, wanted); samples by id, digest and label, since more of them may have come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store.errors import ChangedError, OtherStoreError
from store.listing import Listing
from store.schema import Provenance, Schema

Pairs = Mapping[str, tuple[Any, Any]]  # field -> (stored, wanted)
_SCHEMA_FIELDS = (
    "multi_label",
    "depth",
    "dim",
    "num_prefix_tokens",
    "num_class_tokens",
    "grid",
    "prefix_sets",
    "views",
    "tail_tensors",
    "val_split",
)
_MAX_SHOWN = 3


def differences(pairs: Pairs) -> dict[str, tuple[Any, Any]]:
    """The fields whose two values differ."""
    return {name: (stored, wanted) for name, (stored, wanted) in pairs.items() if stored != wanted}


def refuse_difference(pairs: Pairs, where: str) -> None:
    """Refuse fields whose two values differ.

    Raises:
        OtherStoreError: names all of them, with both values.
    """
    if different := differences(pairs):
        lines = [f"\n  {name}: stored {stored!r}, wanted {wanted!r}" for name, (stored, wanted) in different.items()]
        raise OtherStoreError(
            f"the store {where} was made from something else:{''.join(lines)}\n"
            "Undo that change, or choose another store.path (a store is never overwritten)."
        )


def require_same(stored: Schema, wanted: Schema, where: str) -> None:
    """Refuse a store that was made in another way; samples, classes and layers may differ, since they can be added.

    Raises:
        OtherStoreError: provenance, kind of labels or shape of tokens differ.
    """
    # As JSON, which is how a store keeps them: a tuple equals the list that was stored.
    mine, theirs = stored.provenance.model_dump(mode="json"), wanted.provenance.model_dump(mode="json")
    names = [name for name in Provenance.model_fields if name != "samples"]
    pairs = {f"provenance.{name}": (mine.get(name, ""), theirs.get(name, "")) for name in names}
    if stored.provenance.decoder_digest != wanted.provenance.decoder_digest:
        pairs["libraries"] = (stored.libraries, wanted.libraries)  # shows which versions to install
    pairs |= {name: (getattr(stored, name), getattr(wanted, name)) for name in _SCHEMA_FIELDS}
    refuse_difference(pairs, where)


def holds_all_samples(stored: Schema, wanted: Schema, where: str) -> bool:
    """Whether a store holds the wanted samples and classes, and no others.

    Raises:
        OtherStoreError: as in `require_same`.
    """
    require_same(stored, wanted, where)
    return (stored.provenance.samples, stored.classes) == (wanted.provenance.samples, wanted.classes)


def may_grow_into(schema: Schema, later: Schema) -> bool:
    """Whether a later schema differs in nothing but more samples, splits and layers."""
    same_samples = later.provenance.model_copy(update={"samples": schema.provenance.samples})
    same_size = {"splits": schema.splits, "layers": schema.layers, "provenance": same_samples}
    return (
        schema == later.model_copy(update=same_size)
        and set(schema.layers) <= set(later.layers)
        and schema.splits.keys() <= later.splits.keys()
        and all(info.num_samples <= later.splits[split].num_samples for split, info in schema.splits.items())
    )


@dataclass(frozen=True)
class Samples:
    """The classes of a data set, and the listing of each split."""

    classes: Sequence[str]
    listings: Mapping[str, Listing]


def refuse_changed_samples(stored: Samples, current: Samples, where: str, remedy: str) -> None:
    """Refuse samples of a store that are gone, or whose content or class changed; new samples are legal.

    Raises:
        ChangedError: says how many there are of each kind, with the first ids, and ends with the remedy.
    """
    same_classes = stored.classes == current.classes  # else labels cannot be compared
    lines = _class_lines(stored.classes, current.classes)
    for split, listing in stored.listings.items():
        lines += _sample_lines(split, listing, current.listings[split], same_classes)
    if lines:
        raise ChangedError(f"the samples are no longer those that the store {where} holds:{''.join(lines)}\n{remedy}")


def _class_lines(stored: Sequence[str], current: Sequence[str]) -> list[str]:
    if stored == current:
        return []
    changes = {
        "new": [name for name in current if name not in stored],
        "gone": [name for name in stored if name not in current],
    }
    lines = [f"\n  classes: {_count(names)} {change}" for change, names in changes.items() if names]
    return lines or ["\n  classes: the same in another order"]


def _sample_lines(split: str, stored: Listing, current: Listing, same_classes: bool) -> list[str]:
    row_of = {sample: row for row, sample in enumerate(current.ids)}
    pairs = [(row, row_of[sample]) for row, sample in enumerate(stored.ids) if sample in row_of]
    changes = {
        "gone": [sample for sample in stored.ids if sample not in row_of],
        "changed": [stored.ids[old] for old, new in pairs if (stored.digests[old] != current.digests[new]).any()],
        "of another class": [
            stored.ids[old] for old, new in pairs if same_classes and (stored.labels[old] != current.labels[new]).any()
        ],
        "moved between training and validation": [
            stored.ids[old] for old, new in pairs if _is_validation(stored, old) != _is_validation(current, new)
        ],
    }
    return [f"\n  {split}: {_count(samples)} {change}" for change, samples in changes.items() if samples]


def _is_validation(listing: Listing, row: int) -> bool:
    return listing.validation is not None and bool(listing.validation[row])


def _count(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _MAX_SHOWN else ""
    return f"{len(names):,} ({', '.join(map(repr, names[:_MAX_SHOWN]))}{more})"
