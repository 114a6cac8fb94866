"""Reads and writes the listing of a split: ids, labels and digests of its samples, known before any is decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from store.array_io import read_array, read_strings, write_array, write_strings
from store.arrays import LABEL, NEXT, SAMPLE_DIGEST, SAMPLE_ID, VALIDATION
from store.errors import JobError
from store.io_errors import NEEDS_REPLACING, OutageError
from store.kvstore import KeyValueStore
from store.schema import Schema

Values = TypeVar("Values", np.ndarray, list[str])


@dataclass(frozen=True)
class Listing:
    """Ids, labels and digests of a split's samples, in the order of its rows.

    Attributes:
        labels: class indices (samples,) int64, or multi-label 0/1 (samples, classes) uint8.
        validation: whether each sample is of the source's own validation split; None if the split holds none.
    """

    ids: tuple[str, ...]
    labels: Shaped[np.ndarray, "samples ..."]
    digests: UInt8[np.ndarray, "samples 16"]
    validation: Bool[np.ndarray, "samples"] | None = None


def write_listing(kvstore: KeyValueStore, group: str, listing: Listing) -> None:
    """Write a listing as three arrays below a group, and a fourth one if it marks samples for validation."""
    write_array(kvstore, f"{group}/{LABEL}", listing.labels, ["sample", "class"][: listing.labels.ndim])
    write_array(kvstore, f"{group}/{SAMPLE_DIGEST}", listing.digests, ["sample", "byte"])
    if listing.validation is not None:
        write_array(kvstore, f"{group}/{VALIDATION}", listing.validation.astype(np.uint8), ["sample"])
    write_strings(kvstore, f"{group}/{SAMPLE_ID}", listing.ids, "sample")


def read_listing(kvstore: KeyValueStore, group: str, marks_validation: bool) -> Listing:
    """Read what `write_listing` wrote.

    Args:
        kvstore: the keys of the store.
        group: the group of the listing.
        marks_validation: whether the listing marks samples for validation, as the schema says.

    Raises:
        JobError: an array is missing or damaged, or they do not fit together.
    """
    ids = tuple(read_strings(kvstore, f"{group}/{SAMPLE_ID}"))
    labels, digests = read_array(kvstore, f"{group}/{LABEL}"), read_array(kvstore, f"{group}/{SAMPLE_DIGEST}")
    if not len(ids) == len(labels) == len(digests) or digests.dtype != np.uint8 or digests.shape[1:] != (16,):
        raise JobError(
            f"{kvstore.place}{group} lists {len(ids)} ids, {len(labels)} labels and digests of shape {digests.shape}, "
            f"which do not fit together; {NEEDS_REPLACING}"
        )
    validation = None
    if marks_validation:
        name = f"{group}/{VALIDATION}"
        validation = as_marks(read_array(kvstore, name), len(ids), f"{kvstore.place}{name}")
    return Listing(ids, labels, digests, validation)


def label_fault(labels: np.ndarray, schema: Schema, n_samples: int) -> str | None:
    """What is wrong with labels of a split: their type, shape or values; None for legal ones."""
    n_classes = len(schema.classes)
    dtype, shape = ("uint8", (n_samples, n_classes)) if schema.multi_label else ("int64", (n_samples,))
    n_values = 2 if schema.multi_label else n_classes
    if labels.dtype != dtype or labels.shape != shape:
        return f"holds {labels.dtype} {labels.shape}; should be {dtype} {shape}"
    if labels.size and not 0 <= labels.min() <= labels.max() < n_values:
        return f"has labels from {labels.min()} to {labels.max()}; legal: 0 to {n_values - 1}"
    return None


def validation_fault(values: np.ndarray, n_samples: int) -> str | None:
    """What is wrong with the marks of the validation samples: their type, shape or values; None for legal ones."""
    if values.dtype != np.uint8 or values.shape != (n_samples,):
        return f"holds {values.dtype} {values.shape}; should be uint8 {(n_samples,)}"
    if not np.isin(values, (0, 1)).all():
        return f"has marks up to {values.max()}; legal: 0 and 1"
    return None


def as_marks(values: np.ndarray, n_samples: int, where: str) -> Bool[np.ndarray, "samples"]:
    """Stored marks of the validation samples as booleans.

    Raises:
        JobError: they are damaged; `where` is the name of their array in the message.
    """
    if fault := validation_fault(values, n_samples):
        raise JobError(f"{where} {fault}; {NEEDS_REPLACING}")
    return values.astype(bool)


def read_while_growing(read: Callable[[KeyValueStore, str], Values], kvstore: KeyValueStore, name: str) -> Values:
    """One array of a listing, also while growth replaces it by a longer one.

    It is then read from the redo log; once that is gone, the longer one is in its place.

    Args:
        read: `read_array` or `read_strings`.

    Raises:
        JobError: the array is missing or damaged.
    """
    refusals = []
    for place in (name, f"{NEXT}/{name}", name):
        try:
            return read(kvstore, place)
        except OutageError:
            raise
        except JobError as error:
            refusals.append(error)
    raise refusals[0]
