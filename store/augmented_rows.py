"""Finds the augmented views of the training samples of a store."""

import numpy as np
from jaxtyping import Int

from store.errors import JobError
from store.io_errors import NEEDS_REPLACING
from store.reader import Store
from store.schema import AUGMENTED


def augmented_rows(store: Store) -> Int[np.ndarray, "samples views"] | None:
    """For every row of `train`, the rows of `augmented` that show its sample; None if there are none.

    Raises:
        JobError: a view was skipped, but its sample was not.
    """
    if AUGMENTED not in store.splits:
        return None
    n_views, stored = store.schema.augmented_views, store.array_rows(AUGMENTED)
    wanted = store.array_rows("train")[:, None] * n_views + np.arange(n_views)
    if not np.isin(wanted, stored).all():
        raise JobError(f"{store.url} lacks augmented views of samples that it has; {NEEDS_REPLACING}")
    return np.searchsorted(stored, wanted)
