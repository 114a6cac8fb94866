"""Notes samples of equal content: in train and in test, which then does not test, or with different labels."""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import UInt8

from store.errors import Note
from store.listing import Listing

_Digests = UInt8[np.ndarray, "samples 16"]


def note_repeated_samples(listings: Mapping[str, Listing], views: int) -> None:
    """Warn of samples of equal content.

    Args:
        listings: of the splits `train` and `test`; others are not looked at.
        views: consecutive rows that show the same sample.
    """
    for text in _describe({split: listings[split] for split in ("train", "test") if split in listings}, views):
        warnings.warn(text, Note, stacklevel=2)


def _describe(listings: Mapping[str, Listing], views: int) -> Iterator[str]:
    ids = [sample for listing in listings.values() for sample in listing.ids[::views]]
    ids = ids if views == 1 else [sample.removesuffix("#0") for sample in ids]
    splits = np.concatenate([np.full(len(one.ids[::views]), k) for k, one in enumerate(listings.values())])
    labels = np.concatenate([np.asarray(listing.labels)[::views] for listing in listings.values()])
    digests = np.concatenate([listing.digests[::views] for listing in listings.values()])
    # compare every sample with the first one of its content
    _, first, content = np.unique(digests.view("V16").ravel(), return_index=True, return_inverse=True)
    original = first[content]
    in_both = np.flatnonzero(splits != splits[original])
    if len(in_both):
        yield (
            f"{_count(len(in_both), ' of test')} in train too, such as {ids[in_both[0]]!r}, which is "
            f"{ids[original[in_both[0]]]!r}: what is learned by heart counts as right"
        )
    differs = labels != labels[original]
    relabeled = np.flatnonzero(differs.any(axis=1) if differs.ndim == 2 else differs)
    if len(relabeled):
        yield (
            f"{_count(len(relabeled))} listed again with another label, such as {ids[relabeled[0]]!r}, which is "
            f"{ids[original[relabeled[0]]]!r}"
        )


def _count(number: int, of: str = "") -> str:
    return f"1 sample{of} is" if number == 1 else f"{number:,} samples{of} are"
