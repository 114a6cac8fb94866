"""Compares shuffled reading with other formats: `python -m benchmarks.reading --out benchmarks/results/reading.json`.

All readers (benchmarks/readers.py) read the same made-up int8 tokens of ViT-Tiny and of ViT-B (12 layers, 197 tokens):
all layers of random batches, from a warm page cache, in interleaved rounds. Each reader has a separate process, since
numpy's speed depends on what the C library's allocator did before. The figures are bytes of tokens per second, as the
median over the rounds, and the median of every round's ratio to numpy's memory maps. sidecache has verified every
checksum once before, except in its `first pass`, which opens the store again every time. Then, with a cold page cache,
shuffled passes through the store, by single rows and by blocks (`train.shuffle_block`), are compared with one
sequential read of the same bytes.

Needs 4 GB of disk in --folder, and a few minutes. Libraries that are not installed are left out and listed.
"""

import argparse
import importlib.util
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from adapt.training.batch_order import WINDOW, epoch_batches
from benchmarks.made_up import StoreShape, write_store
from benchmarks.readers import MEMMAP, OPTIONAL, READERS, Batches, memmap, sidecache_first_pass
from benchmarks.record import add_record_options, machine, save
from store.layout import in_groups
from store.reader import Store, open_store

VERSIONS = ("numpy", "tensorstore", "google-crc32c", "zarr", "zarrs", "h5py", "litdata", "webdataset", "torch")
BLOCKS = (1, 8, 32)  # of train.shuffle_block
_PIECE = 8 * 2**20  # bytes of one sequential read


@dataclass(frozen=True)
class Setting:
    """The tokens that are stored, and how many of them are read in a round."""

    name: str
    samples: int
    dim: int
    layers: int = 12
    grid: tuple[int, int] = (14, 14)
    shard_samples: int = 256
    batch_size: int = 64
    batches: int = 8


def draw_batches(setting: Setting, seed: int) -> list[np.ndarray]:
    """The batches of a round."""
    order = np.random.default_rng(seed).permutation(setting.samples)
    return list(in_groups(order, setting.batch_size))[: setting.batches]


def serve(name: str, url: str, folder: Path, connection: Connection) -> None:
    """Run a reader in its process: one pass in order, then answer every list of groups with its seconds.

    At None, compare its bytes with the memory maps.

    Raises:
        AssertionError: they differ.
    """
    store = open_store(url)
    batches = READERS[name](store, folder)
    in_order = in_groups(np.arange(store.num_samples("train")), 64)
    exhaust(batches, in_order)
    connection.send("ready")
    while groups := connection.recv():
        connection.send(seconds_of(lambda groups=groups: exhaust(batches, groups)))
    check_equal(batches, memmap(store, folder), in_order)
    connection.send("checked")


def check_equal(batches: Batches, truth: Batches, groups: Sequence[np.ndarray]) -> None:
    """Raise AssertionError if two readers give different bytes."""
    for rows, tokens in batches(groups):
        _, expected = next(truth([rows]))
        for layer, pair in expected.items():
            for mine, theirs in zip(tokens[layer], pair, strict=True):
                np.testing.assert_array_equal(mine, theirs, err_msg=f"layer {layer}")


class Reader:
    """A reader in a separate process."""

    def __init__(self, name: str, store: Store, folder: Path) -> None:
        fresh = multiprocessing.get_context("forkserver")  # a clean process in which only the imports have run
        fresh.set_forkserver_preload(["benchmarks.readers"])
        self._connection, theirs = fresh.Pipe()
        fresh.Process(target=serve, args=(name, store.url, folder, theirs), daemon=True).start()
        theirs.close()
        self._connection.recv()

    def ask(self, groups: Sequence[np.ndarray] | None) -> Any:
        """Send groups, and return the answer; EOFError if the process failed, with its traceback on standard error."""
        self._connection.send(groups)
        return self._connection.recv()


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def exhaust(batches: Batches, groups: Sequence[np.ndarray]) -> None:
    """Read all groups."""
    for _ in batches(groups):
        pass


def warm(store: Store, folder: Path, setting: Setting, repeats: int) -> dict[str, Any]:
    """Measure all readers with a warm page cache; every round draws new batches and a new order of the readers."""
    left_out = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    found = {name: Reader(name, store, folder) for name in READERS if name not in left_out}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats):
        groups = draw_batches(setting, number)
        for name in np.random.default_rng(number).permutation(list(found)):
            seconds[name].append(found[name].ask(groups))
    for reader in found.values():
        reader.ask(None)
    n_bytes = store.schema.bytes_per_sample * sum(map(len, draw_batches(setting, 0)))
    return {
        "gb_per_second": {name: n_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()},
        "ratio_to_memmap": {name: ratio(seconds[MEMMAP], values) for name, values in seconds.items()},
        "seconds": seconds,
        "left_out": left_out,
    }


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of the ratios of every round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def cold(store: Store, folder: Path, setting: Setting, repeats: int) -> dict[str, Any]:
    """Measure one shuffled pass over all rows, by rows and by blocks, and a sequential read, with a cold page cache."""
    raw = sorted((folder / "raw").iterdir())
    shards = sorted(file for file in (folder / "cache.zarr").rglob("*") if file.is_file())
    seconds: dict[str, list[float]] = {"sequential": [], **{f"shuffle_block {block}": [] for block in BLOCKS}}
    for number in range(repeats):
        forget(raw)
        seconds["sequential"].append(seconds_of(lambda: read_through(raw)))
        for block in BLOCKS:
            forget(shards)
            groups = read_together(setting, number, block)
            taken = seconds_of(lambda groups=groups: exhaust(sidecache_first_pass(store), groups))
            seconds[f"shuffle_block {block}"].append(taken)
    n_bytes = sum(file.stat().st_size for file in raw)
    rates = {name: n_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
    shares = {name: ratio(seconds["sequential"], values) for name, values in seconds.items()}
    return {"gb_per_second": rates, "ratio_to_sequential": shares, "seconds": seconds}


def read_together(setting: Setting, epoch: int, block: int) -> list[np.ndarray]:
    """The groups of rows that training reads at once: batches or, with blocks, windows of as many rows, sorted."""
    batch_size = setting.batch_size if block == 1 else max(1, setting.batch_size // WINDOW)
    batches = epoch_batches(setting.samples, math.ceil(setting.samples / batch_size), epoch, block)
    if block == 1:
        return batches
    return [np.sort(np.concatenate(window)) for window in in_groups(batches, WINDOW)]


def read_through(files: Sequence[Path]) -> None:
    """Read files sequentially."""
    piece = bytearray(_PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache; they are synced first, since dirty pages are not dropped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure one setting."""
    shape = StoreShape(
        samples=setting.samples,
        layers=setting.layers,
        grid=setting.grid,
        dim=setting.dim,
        shard_samples=setting.shard_samples,
    )
    store = write_store(folder / "cache.zarr", shape)
    figures: dict[str, Any] = {"setting": asdict(setting), "warm": warm(store, folder, setting, repeats)}
    return figures | {"cold": cold(store, folder, setting, repeats)}


def main() -> None:
    """Measure ViT-Tiny and ViT-B tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="of ViT-Tiny; ViT-B has a quarter of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for temporary files; the system's by default")
    add_record_options(parser)
    args = parser.parse_args()
    settings = [Setting("ViT-Tiny", args.samples, 192), Setting("ViT-B", args.samples // 4, 768)]
    figures: dict[str, Any] = {**machine(VERSIONS), "repeats": args.repeats, "settings": []}
    for setting in settings:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            figures["settings"].append(measure(setting, Path(scratch), args.repeats))
    save(figures, args.out)


if __name__ == "__main__":
    main()
