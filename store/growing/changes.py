"""What has happened to the samples that a store holds, since it was made."""

from collections.abc import Mapping, Sequence

from store.errors import ChangedError
from store.kvstore import KeyValueStore
from store.reader import Store
from store.schema import Schema
from store.writer import Listing, read_listing

_SHOWN = 3


def require_growth(folder: KeyValueStore, stored: Schema, wanted: Schema, listings: Mapping[str, Listing]) -> None:
    """Refuse samples that are not the store's, as they were, and perhaps more of the same classes.

    Args:
        listings: of all splits, the store's samples first and in its order.

    Raises:
        ChangedError: samples are gone, or their content or class is another one, or there are other classes; the
            message shows how many, and the first ids of each kind.
    """
    held = {split: read_listing(folder, split) for split in stored.splits}
    if lines := _changes(stored.classes, wanted.classes, held, listings):
        raise ChangedError(
            f"the samples are no longer those that the store {folder.place} holds:{lines}\n"
            "Only new samples of its classes can be added. Put the old ones back, choose another store.path, or "
            "extract all to a store beside this one: `sidecache extract --on-changed new-store`"
        )


def require_unchanged(store: Store, classes: Sequence[str], listings: Mapping[str, Listing]) -> None:
    """Refuse samples that are not those that can be read from a store, as they were.

    Args:
        listings: of all splits; samples that the store does not know do not matter.

    Raises:
        ChangedError: as of `require_growth`.
    """
    held = {split: store.listing(split) for split in store.splits}
    if lines := _changes(store.classes, classes, held, listings):
        raise ChangedError(
            f"the samples are no longer those that the store {store.url} holds:{lines}\n"
            "Methods that train end to end read the images again. Put the old ones back, or extract to another store: "
            "choose another store.path, or `sidecache run --on-changed new-store`"
        )


def _changes(
    stored: Sequence[str], wanted: Sequence[str], held: Mapping[str, Listing], listings: Mapping[str, Listing]
) -> str:
    """What differs of classes and samples, in a line each."""
    lines = _class_lines(stored, wanted)
    for split, listing in held.items():
        lines += _sample_lines(split, listing, listings[split], stored == wanted)  # else labels cannot be compared
    return "".join(lines)


def _class_lines(stored: Sequence[str], wanted: Sequence[str]) -> list[str]:
    if stored == wanted:
        return []
    new, gone = ([name for name in here if name not in there] for here, there in ((wanted, stored), (stored, wanted)))
    lines = [f"\n  classes: {_count(names)} {what}" for what, names in (("new", new), ("gone", gone)) if names]
    return lines or ["\n  classes: the same in another order"]


def _sample_lines(split: str, stored: Listing, wanted: Listing, same_classes: bool) -> list[str]:
    row_of = {sample: row for row, sample in enumerate(wanted.ids)}
    pairs = [(row, row_of[sample]) for row, sample in enumerate(stored.ids) if sample in row_of]
    found = {
        "gone": [sample for sample in stored.ids if sample not in row_of],
        "changed": [stored.ids[old] for old, new in pairs if (stored.digests[old] != wanted.digests[new]).any()],
        "of another class": [
            stored.ids[old] for old, new in pairs if same_classes and (stored.labels[old] != wanted.labels[new]).any()
        ],
    }
    return [f"\n  {split}: {_count(samples)} {what}" for what, samples in found.items() if samples]


def _count(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,} ({', '.join(map(repr, names[:_SHOWN]))}{more})"
