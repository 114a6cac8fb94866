"""A store with impossible JSON and right checksums: a message, little memory, and nothing outside is touched."""

import shutil
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from memory_limit import little_memory
from numcodecs import CRC32C
from small_store import kvstore_at
from store_jobs import Jobs, renew, state

from extract.backbones.backbone import TimmBackbone
from store.array_io import CONTENT, _content_digest, write_array, write_strings
from store.arrays import open_schema, shard_arrays
from store.errors import JobError, UserError
from store.kvstore import KeyValueStore
from store.schema import Schema, SplitInfo

ELSEWHERE = ("../../victim/folder", "train/../../../victim/folder", "/", "..", ".", "", "a/b")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: TimmBackbone) -> Jobs:
    jobs = Jobs(tmp_path_factory.mktemp("forged"), tiny_backbone, "plain")
    jobs.make(jobs.folder / "whole.zarr")
    return jobs


@pytest.fixture
def fresh(jobs: Jobs) -> Jobs:
    renew(jobs)
    return jobs


def sized(n: int) -> dict[str, Any]:
    return {"splits": {name: SplitInfo.model_construct(num_samples=n) for name in ("train", "test")}}


NUMERIC: dict[str, Callable[[int], dict[str, Any]]] = {
    "num_samples": sized,
    "shard_samples": lambda n: {"shard_samples": n},
    "dim": lambda n: {"dim": n},
    "depth": lambda n: {"depth": n},
    "layers": lambda n: {"layers": (0, n)},
    "num_prefix_tokens": lambda n: {"num_prefix_tokens": n},
    "grid": lambda n: {"grid": (n, n)},
    "prefix_sets": lambda n: {"prefix_sets": n},
    "views": lambda n: {"views": n},
}


def schema_of(kvstore: KeyValueStore) -> Schema:
    schema = open_schema(kvstore)
    assert schema is not None
    return schema


def forge(kvstore: KeyValueStore, changes: dict[str, Any], everywhere: bool = False) -> None:
    """Change the schema and, if `everywhere`, the metadata of all arrays accordingly."""
    forged = schema_of(kvstore).model_copy(update=changes)
    arrays = {split: shard_arrays(forged, split) for split in (forged.splits if everywhere else ())}
    kvstore.write_group("", forged.model_dump(mode="json", warnings=False))
    for split, nodes in arrays.items():
        for name, metadata in nodes.items():
            kvstore.write_node(f"{split}/{name}", metadata)


def outcome(run: Callable[[], None]) -> str:
    """The result of a job with little memory: "done", a refusal, or a traceback."""
    try:
        with little_memory(512):
            run()
    except (JobError, UserError) as error:
        return f"refused: {error}"
    except Exception:  # a crash is an outcome
        return traceback.format_exc()
    return "done"


def outcomes(jobs: Jobs) -> dict[str, str]:
    """The outcomes of all jobs on the store; checks that the victim is unchanged."""
    before, kept, found = state(jobs.folder / "victim"), jobs.folder / "kept.zarr", {}
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(jobs.store, kept)
    for name, run in jobs.all.items():
        found[name] = outcome(run)
        assert state(jobs.folder / "victim") == before, name
        shutil.rmtree(jobs.store)
        shutil.copytree(kept, jobs.store)
    return found


def unlike(found: dict[str, str], *legal: str) -> dict[str, str]:
    return {name: text for name, text in found.items() if not text.startswith(legal)}


@pytest.mark.parametrize("number", [-1, 2**63, 10**30])
@pytest.mark.parametrize("field", NUMERIC)
def test_a_number_that_cannot_be_is_refused_by_every_command(fresh: Jobs, field: str, number: int) -> None:
    forge(kvstore_at(fresh.store), NUMERIC[field](number))
    assert unlike(outcomes(fresh), "refused: ") == {}


@pytest.mark.parametrize("number", [0, 2**31, 2**40])
@pytest.mark.parametrize("field", NUMERIC)
def test_no_memory_is_taken_for_what_the_files_cannot_hold(fresh: Jobs, field: str, number: int) -> None:
    """The metadata of all arrays agree with the schema; `inspect` may print it."""
    try:
        forge(kvstore_at(fresh.store), NUMERIC[field](number), everywhere=True)
    except (ZeroDivisionError, UserError):  # there are no such metadata
        forge(kvstore_at(fresh.store), NUMERIC[field](number))
    found = outcomes(fresh)
    assert unlike(found, "refused: ", "done") == {}
    if number and field != "prefix_sets":  # which no file has the size of
        assert unlike({name: found[name] for name in ("train", "repair", "extract")}, "refused: ") == {}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("place", ["", "_log/next", "_log/added"])
@pytest.mark.parametrize("field", ["splits", "tail_tensors"])
def test_no_name_leads_out_of_the_store(fresh: Jobs, place: str, field: str, name: str) -> None:
    """Layers that were being added, for instance, are deleted by the names in their schema."""
    kvstore = kvstore_at(fresh.store)
    names: dict[str, Any] = {"tail_tensors": (name,)}
    if field == "splits":
        names = {"splits": {split: SplitInfo(num_samples=6) for split in ("train", "test", name)}}
    schema = schema_of(kvstore).model_copy(update=names).model_dump(mode="json")
    kvstore.write_group(place, {"schema": schema, "ready": True} if place else schema)
    found = outcomes(fresh)
    assert unlike(found, "refused: ", "done") == {}
    assert found["grow_layers"].startswith("refused: ")  # it reads all three


@pytest.mark.parametrize("attributes", [{"ready": True}, {"schema": None}, {"schema": []}, {"schema": {"a": 1}}])
@pytest.mark.parametrize("place", ["_log/next", "_log/added"])
def test_a_log_without_a_schema_is_refused(fresh: Jobs, place: str, attributes: dict[str, Any]) -> None:
    kvstore_at(fresh.store).write_group(place, attributes)
    assert unlike({"grow_layers": outcomes(fresh)["grow_layers"]}, "refused: ") == {}


@pytest.mark.parametrize(
    "log",
    [
        {"extract_seconds": "1"},
        {"extract_seconds": -1},
        {"extract_seconds": 10**400},
        {"skipped": 3},
        {"forward_samples": []},
        {"forward_samples": float("nan")},
    ],
    ids=str,
)
def test_a_log_of_other_than_costs_is_refused(fresh: Jobs, log: dict[str, Any]) -> None:
    kvstore_at(fresh.store).write_group("_log", {"extract_seconds": 1.0, "skipped": {}, **log})
    found = outcomes(fresh)
    assert unlike(found, "refused: ", "done") == {}
    assert unlike({name: found[name] for name in ("inspect", "train", "repair")}, "refused: ") == {}


ARRAYS: dict[str, Callable[[KeyValueStore], None]] = {
    "fewer labels": lambda f: write_array(f, "train/label", np.zeros(3, np.int64), ["sample"]),
    "labels of no class": lambda f: write_array(f, "train/label", np.full(6, 2**62), ["sample"]),
    "negative labels": lambda f: write_array(f, "train/label", np.full(6, -(2**62)), ["sample"]),
    "labels that are fractions": lambda f: write_array(f, "train/label", np.zeros(6, np.float32), ["sample"]),
    "short digests": lambda f: write_array(f, "train/sample_digest", np.zeros((6, 8), np.uint8), ["sample", "byte"]),
    "fewer digests": lambda f: write_array(f, "train/sample_digest", np.zeros((3, 16), np.uint8), ["sample", "byte"]),
    "fewer ids": lambda f: write_strings(f, "train/sample_id", ["a"], "sample"),
    "fewer channels": lambda f: write_array(f, "rms/layer_00", np.ones(3, np.float32), ["channel"]),
    "more values than bytes": lambda f: forge_whole(f, "train/label", {"shape": [2**40]}),
    "negative length": lambda f: forge_whole(f, "train/label", {"shape": [-6]}),
    "length that is no number": lambda f: forge_whole(f, "train/label", {"shape": ["6"]}),
    "objects": lambda f: forge_whole(f, "train/label", {"data_type": "object"}),
    "wide type": lambda f: forge_whole(f, "train/label", {"data_type": "V1000000000000"}),
    "more strings than bytes": lambda f: forge_whole(
        f, "train/sample_id", {"shape": [2**31]}, (2**31).to_bytes(4, "little")
    ),
    "strings that are cut": lambda f: forge_whole(f, "train/sample_id", {"shape": [1]}, b"\1\0\0\0\xff\0\0\0"),
    "strings of no text": lambda f: forge_whole(f, "train/sample_id", {"shape": [1]}, b"\1\0\0\0\1\0\0\0\xff"),
}


def forge_whole(kvstore: KeyValueStore, name: str, changes: dict[str, Any], content: bytes | None = None) -> None:
    """Change the metadata of an array in one chunk, or its content too, with the digest that fits."""
    document = {**(kvstore.read_node(name) or {}), **changes}
    key = f"{name}/c/0"
    stored = kvstore.read_bytes(key) if content is None else bytes(CRC32C(location="end").encode(content))
    assert stored is not None
    kvstore.write_bytes(key, stored)
    kvstore.write_node(name, {**document, "attributes": {CONTENT: _content_digest(name, document, stored)}})


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_does_not_fit_the_store_is_refused(fresh: Jobs, kind: str) -> None:
    ARRAYS[kind](kvstore_at(fresh.store))
    found = outcomes(fresh)
    assert unlike(found, "refused: ", "done") == {}
    assert found["verify"].startswith("refused: ")
