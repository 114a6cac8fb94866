"""A reader of a growing store sees the rows that the store had when it was opened, at every moment of the growth."""

import json
import pickle
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Semaphore, Thread
from typing import Any
from unittest import mock

import numpy as np
import pytest
import small_store
import tensorstore as ts
from crash import KilledError, before_each_write, killed_at
from PIL import Image
from slow_cases import all_but_first_slow
from torch.utils.data import DataLoader

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job import feature_set
from adapt.job.feature_set import open_features
from adapt.job.inputs import Inputs
from adapt.run_dir.results import Row
from adapt.training import checkpoint
from adapt.training.distributed import World
from extract.backbones.backbone import load_backbone
from store import arrays
from store.arrays import MarkPlace, require_store
from store.dtypes import CODES
from store.errors import JobError
from store.growing.added_layers import begin_layers, finish_layers
from store.growing.growth import grow, read_known
from store.kvstore import KeyValueStore
from store.lock import hold
from store.reader import Store, open_store
from store.schema import Schema, SplitInfo
from store.writer import StoreWriter

SHARD = 4
SMALL, LARGE = {"train": 6, "test": 2}, {"train": 13, "test": 3}  # the last shards are not full, and grow
SKIP = (1, 4)  # undecodable rows of train, in a full shard and in the last one
RMS = {**small_store.RMS, 1: np.array([2, 0.5, 1, 7], np.float32)}
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("disk", {"dtype": "float32"}),
    ("disk", {"dtype": "int8"}),
    ("disk", {"dtype": "float16", "compressor": "zstd"}),
    ("memory", {"dtype": "int8", "compressor": "gzip", "multi_label": True}),
]


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip syncs to disk: no machine fails here."""
    context = ts.Context({"file_io_sync": False})
    monkeypatch.setattr("store.kvstore._context", lambda: context)


@contextmanager
def sizes(of_splits: dict[str, int]) -> Iterator[None]:
    with mock.patch.dict(small_store.SIZES, of_splits), mock.patch.dict(small_store.RMS, RMS):
        yield


def make(path: Path | str, **options: Any) -> Schema:
    with sizes(SMALL):
        wanted = small_store.schema(shard_samples=SHARD, **options)
        small_store.complete(path, wanted, skip=SKIP)
    return wanted


def add_samples(path: Path | str, skip: Collection[int] = SKIP) -> None:
    folder = small_store.kvstore_at(path)
    stored = require_store(folder)
    with sizes(LARGE), hold(folder) as lock:
        samples = stored.provenance.model_copy(update={"samples": dict.fromkeys(LARGE, "grown")})
        info = {split: SplitInfo(num_samples=n) for split, n in LARGE.items()}
        target = stored.model_copy(update={"splits": info, "provenance": samples})
        grow(folder, target, lock, {split: small_store.listing(split, target.multi_label) for split in LARGE})
        small_store.complete(path, target, skip)


def add_layer(path: Path | str) -> None:
    folder = small_store.kvstore_at(path)
    stored = require_store(folder)
    now = {split: info.num_samples for split, info in stored.splits.items()}
    with sizes(now), hold(folder) as lock:
        added = stored.model_copy(update={"layers": (1,)})
        begin_layers(folder, stored, added, {1: RMS[1]} if added.dtype in CODES else {}, lock)
        writer = StoreWriter(folder, added, lock, MarkPlace.ADDED_LAYERS)
        for split in added.splits:
            for shard in added.shards(split):
                small_store.commit(path, writer, added, split, shard, SKIP if split == "train" else ())
        finish_layers(folder, stored, added, lock)


def add_both(path: Path | str) -> None:
    add_samples(path)
    add_layer(path)


def observed(store: Store) -> dict[str, Any]:
    """Everything that a store returns, without its log; rows in stored order and in another one."""
    found: dict[str, Any] = {"schema": store.schema, "tail": store.tail_arrays(), "rms": store.rms}
    store.require_complete()
    for split in store.splits:
        order = np.random.default_rng(0).permutation(store.num_samples(split))
        shuffled, whole = store.read(split, order), store.read(split, slice(None))
        np.testing.assert_equal(shuffled, {layer: values[order] for layer, values in whole.items()})
        listing = store.listing(split)
        found |= {
            f"{split} tokens": whole,
            f"{split} labels": store.labels(split),
            f"{split} ids": store.sample_ids(split),
            f"{split} listing": (listing.ids, listing.labels, listing.digests),
            f"{split} skipped": store.skipped(split),
        }
    return found


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(("place", "options"), all_but_first_slow(FORMATS, unpack=True), ids=str)
def test_a_store_that_is_open_is_read_at_every_instant_of_growth(
    tmp_path: Path, place: str, options: dict[str, Any]
) -> None:
    """For a reader that has read everything before, for readers that open their arrays then, and for copies."""
    path = str(tmp_path / "c.zarr") if place == "disk" else f"memory://{tmp_path.name}/c.zarr"
    make(path, **options)
    early, truth = open_store(path), observed(open_store(path))
    np.testing.assert_equal(observed(early), truth)
    late = [open_store(path) for _ in range(250)]
    writes = 0

    def look() -> None:
        nonlocal writes
        store = late[writes] if writes % 2 else pickle.loads(pickle.dumps(early))
        for reading in (early, store):
            np.testing.assert_equal(observed(reading), truth, err_msg=f"before write {writes}")
        writes += 1

    with before_each_write(look):
        add_both(path)
    look()
    assert 90 < writes < len(late)
    now = open_store(path)
    assert (now.num_samples("train"), now.layers) == (11, (0, 1, 2))
    now.require_complete()


def test_a_reader_that_never_pauses_reads_on_through_growth(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    make(path, dtype="int8")
    store, truth, ended, faults = open_store(path), observed(open_store(path)), Event(), list[BaseException]()

    def read_on() -> None:
        try:
            while not ended.is_set():
                np.testing.assert_equal(observed(pickle.loads(pickle.dumps(store))), truth)
                np.testing.assert_equal(observed(store), truth)
        except BaseException as fault:
            faults.append(fault)

    thread = Thread(target=read_on)
    thread.start()
    add_both(path)
    ended.set()
    thread.join()
    assert faults == []


@pytest.mark.parametrize("options", [options for _, options in FORMATS], ids=str)
def test_a_sample_that_growth_cannot_decode_again_is_an_error_not_zeros(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "c.zarr"
    make(path, **options)
    store, lost = open_store(path), 5 - len(SKIP)  # row 5, in the last shard
    truth, refusals = store.read("train", range(4)), list[str]()

    def look() -> None:
        others = [row for row in range(4) if row != lost]
        np.testing.assert_equal(store.read("train", others), {k: v[others] for k, v in truth.items()})
        try:
            np.testing.assert_equal(store.read("train", [lost, 0]), {k: v[[lost, 0]] for k, v in truth.items()})
        except JobError as error:
            refusals.append(str(error))

    with before_each_write(look):
        add_samples(path, skip=[*SKIP, 5])
    assert len(refusals) > 3
    assert set(refusals) == {
        f"row 5 of train in {path}/ could not be decoded when the store grew, which extracted it again; open the store "
        "again"
    }
    assert open_store(path).num_samples("train") == 10


def test_workers_that_start_as_a_store_grows_read_the_rows_of_their_parent(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    make(path, dtype="float32")
    dataset = open_store(path).dataset("train", [2])
    truth = [tokens[2] for tokens, _ in (dataset[row] for row in range(len(dataset)))]
    with killed_at(25), pytest.raises(KilledError):
        add_samples(path)
    with pytest.raises(JobError, match="was interrupted, or is under way"):
        open_store(path)
    for tokens, expected in zip(
        DataLoader(dataset, num_workers=1, multiprocessing_context="spawn"), truth, strict=True
    ):
        np.testing.assert_array_equal(tokens[0][2][0], expected)


def test_a_store_that_grows_as_it_is_opened_is_opened_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "c.zarr", 0
    make(path, dtype="float32")
    read = arrays.read_status

    def slowly(*given: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 2:
            add_samples(path)
        return read(*given)

    monkeypatch.setattr(arrays, "read_status", slowly)
    store = open_store(path)
    store.require_complete()
    assert (store.num_samples("train"), len(store.labels("train"))) == (11, 11)


@pytest.mark.parametrize("call", range(1, 14))
@pytest.mark.usefixtures("quick_disk")
def test_what_a_job_knows_of_a_store_that_grows_meanwhile_fits_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Growth is finished, or stops half-way, as each file is read."""
    path, calls, read = tmp_path / "c.zarr", 0, KeyValueStore.read_bytes
    make(path, dtype="float32")

    def meanwhile(folder: KeyValueStore, key: str) -> bytes | None:
        nonlocal calls
        calls += 1
        if calls == call:
            with killed_at(5 * call), suppress(KilledError):
                add_samples(path)
        return read(folder, key)

    monkeypatch.setattr(KeyValueStore, "read_bytes", meanwhile)
    known = read_known(small_store.kvstore_at(path))
    assert known is not None
    assert {split: len(ids) for split, ids in known.ids.items()} in (SMALL, LARGE)
    for split, info in known.schema.splits.items():
        assert len(known.ids[split]) == info.num_samples


@pytest.mark.parametrize("n_train", [3, 9])
def test_another_store_in_its_place_is_refused(tmp_path: Path, n_train: int) -> None:
    path = tmp_path / "c.zarr"
    make(path, dtype="float32")
    stores = [open_store(path) for _ in range(3)]
    shutil.rmtree(path)
    with sizes({"train": n_train, "test": 2}):
        other = small_store.provenance(dtype="float32", weights_digest="another")
        small_store.complete(path, small_store.schema(shard_samples=SHARD, provenance=other))
    for store, read in zip(stores, (Store.labels, Store.sample_ids, lambda s, split: s.read(split, [0])), strict=True):
        with pytest.raises(JobError, match=r"c\.zarr/ was replaced by another store; open it again"):
            read(store, "train")


# Training


METHODS = "methods=[linear_probe, {name: losa, rank: 4, token_rank: 2}, {name: ladder}]"


def add_images(config: Config, names: str) -> None:
    root = config.data.root
    assert root is not None
    for split in ("train", "test"):
        for k, folder in enumerate(("blue", "green", "red")):
            for name in names:
                pixels = np.random.default_rng([ord(name), k, len(split)]).integers(0, 255, (32, 40, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / folder / f"new {name}.png")


def results(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows of a run, without measured time, memory and disk space."""
    compared = ("trial_id", "method", "seed", "best_epoch", "val_score", "top1", "conditions")
    return [{name: getattr(row, name) for name in compared} for row in rows]


def adaptors(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run_dir / "adaptors").iterdir()}


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_training_goes_on_while_samples_and_layers_are_added(
    tiny_config: Callable[..., Config], tmp_path: Path, dtype: str
) -> None:
    """Every write of the growing job waits until training reads another batch."""
    job = ("train.feature_source=streamed", f"store.dtype={dtype}", METHODS, "train.epochs=16", "train.batch_size=3")
    before = tiny_config(*job, "store.layers=[0, 2]", f"run_dir={tmp_path / 'before'}")
    sc.extract(before)
    alone = sc.train(before)
    add_images(before, "ab")
    to_write, to_read, trained, grown, writes = Semaphore(0), Semaphore(0), Event(), Event(), 0
    fetch, opened = Store.fetch, Store.require_complete
    # loaded before both jobs run: random weights and training draw from the same generator of the process
    backbone = load_backbone(before.backbone)

    def wait(turn: Semaphore, other_ended: Event) -> None:
        while not other_ended.is_set() and not turn.acquire(timeout=0.01):
            pass

    def fetched(*given: Any, **named: Any) -> Any:
        to_write.release()
        wait(to_read, grown)
        return fetch(*given, **named)

    def take_turns() -> None:
        nonlocal writes
        wait(to_write, trained)
        writes += not trained.is_set()
        to_read.release()

    def extract() -> None:
        try:
            with before_each_write(take_turns):
                sc.extract(tiny_config(*job, "store.layers=all"), backbone=backbone)
        finally:
            grown.set()

    def begin_to_grow(store: Store) -> None:
        opened(store)
        if not growing.is_alive():
            growing.start()

    growing, during = Thread(target=extract), before.model_copy(update={"run_dir": tmp_path / "during"})
    with mock.patch.object(Store, "fetch", fetched), mock.patch.object(Store, "require_complete", begin_to_grow):
        try:
            rows = sc.train(during)
        finally:
            trained.set()
            growing.join()
    assert results(rows) == results(alone)
    assert adaptors(during.run_dir) == adaptors(before.run_dir)
    assert writes > 80, "growth fell into the training"
    grown = open_store(before.store.path)
    assert (grown.num_samples("train"), grown.layers) == (30, (0, 1, 2))


def test_training_that_is_resumed_on_a_store_that_has_grown_begins_anew(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SAVE_EVERY_SECONDS", 0)  # after every step
    monkeypatch.setattr(checkpoint, "_SHARE_OF_TIME", float("inf"))
    job = ("train.feature_source=streamed", METHODS)
    config, once = tiny_config(*job), tiny_config(*job, f"run_dir={tmp_path / 'once'}")
    sc.extract(config)
    steps, fetch = 0, Store.fetch

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 8:
            raise KilledError
        return fetch(*given, **named)

    with mock.patch.object(Store, "fetch", killed), pytest.raises(KilledError):
        sc.train(config)
    assert list((config.run_dir / "checkpoints").iterdir()), "something to go on from"
    add_images(config, "a")
    sc.extract(config)
    assert results(sc.train(config))[-3:] == results(sc.train(once))


def test_all_processes_that_train_together_have_the_store_of_the_one_that_leads(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("train.feature_source=streamed")
    sc.extract(config)
    led = json.dumps(open_store(config.store.path).snapshot())
    add_images(config, "a")
    sc.extract(config)

    class Follower(World):
        def broadcast(self, value: Any) -> Any:
            return json.loads(led) if value is None else value

    monkeypatch.setattr(feature_set, "world", lambda: Follower(1, 2))
    store = open_features(config, Inputs(config), lambda _: None).store
    assert store is not None
    assert store.num_samples("train") == 24
