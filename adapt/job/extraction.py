"""The extraction of a configuration, to its own store or, where samples have changed, to one beside that."""

from collections.abc import Iterator
from itertools import count
from typing import Literal

from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from extract.job.extraction import Extraction, Missing, extract_tokens
from store.errors import ChangedError, OtherStoreError

OnChanged = Literal["fail", "new-store"]


def extract(config: Config, inputs: Inputs, on_changed: OnChanged = "fail") -> Extraction:
    """Bring the store of a configuration to completion; `Extraction.path` tells which one it was.

    Args:
        on_changed: what to do where samples that the store holds are gone or changed. `new-store` leaves it as it is
            and takes the first path beside it where there is nothing yet, or a store of just these samples.

    Raises:
        ChangedError: samples that the store holds are gone or changed, and it is to `fail` then.
        UserError, JobError: as of `extract_tokens`.
    """
    try:
        return _extract(config, inputs)
    except ChangedError:
        if on_changed == "fail":
            raise
    for path in _paths_beside(config.store.path):
        other = at_store(config, path)
        try:
            return _extract(other, inputs.at(other))
        except OtherStoreError:
            continue
    raise AssertionError("there is always a path beside")


def repair(config: Config, inputs: Inputs, damaged: Missing) -> Extraction:
    """Extract damaged shards of a store anew, by the job that made it.

    Raises:
        UserError, JobError: as of `extract_tokens`; a job of other samples, backbone or format leaves all as it is.
    """
    return _extract(config, inputs, damaged)


def at_store(config: Config, path: str) -> Config:
    """The configuration with another store.path."""
    return config.model_copy(update={"store": config.store.model_copy(update={"path": path})})


def _extract(config: Config, inputs: Inputs, again: Missing | None = None) -> Extraction:
    recipe = None if inputs.own_backbone else config.backbone
    return extract_tokens(inputs.source, inputs.backbone, config.data, config.store, config.extract, recipe, again)


def _paths_beside(path: str) -> Iterator[str]:
    """`a/cache-2.zarr`, `a/cache-3.zarr` ... for `a/cache.zarr`."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    stem, dot, ending = name.rpartition(".") if name.rpartition(".")[0] else (name, "", "")
    return (f"{folder}{slash}{stem}-{number}{dot}{ending}" for number in count(2))
