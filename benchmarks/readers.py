"""The readers that `reading.py` compares: each writes a store's tokens in its format, and reads batches of them.

A reader takes the rows of every batch and yields, for every batch, its rows and {layer: (values, scales)}: int8
(rows, tokens, dim) and float32 (rows, tokens). All read the same bytes. Only sidecache, tensorstore, zarr and zarrs,
which read the same store, verify checksums; only webdataset, which reads sequentially, yields other rows.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
import zarr

from store.reader import Store, open_store

Batch = tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]
Batches = Callable[[Sequence[np.ndarray]], Iterator[Batch]]
KEPT = "numpy memmap, take into kept arrays"
MEMMAP, SIDECACHE = "numpy memmap, fancy index", "sidecache"
_AHEAD = 2  # batches read ahead, as in training


def names(layers: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Layer -> names of its two arrays."""
    return {layer: (f"layer_{layer:02d}", f"scale_{layer:02d}") for layer in layers}


def sidecache(store: Store) -> Batches:
    """`Store.fetch`, with the read-ahead of training."""

    def batches(groups: Sequence[np.ndarray]) -> Iterator[Batch]:
        pending = [store.fetch("train", rows) for rows in groups[:_AHEAD]]
        for position, rows in enumerate(groups):
            pending += [store.fetch("train", ahead) for ahead in groups[position + _AHEAD : position + _AHEAD + 1]]
            found = pending.pop(0).result()
            yield rows, {layer: (part.values, part.scale) for layer, part in found.items()}

    return batches


def sidecache_first_pass(store: Store) -> Batches:
    """Open the store again every time, so that every checksum is verified."""
    return lambda groups: sidecache(open_store(store.url))(groups)


def by_layer(store: Store, arrays: Callable[[str], Any], rows_of: Callable[[Any, np.ndarray], Any]) -> Batches:
    """A reader of one array after the other."""
    opened = {layer: [arrays(name) for name in pair] for layer, pair in names(store.layers).items()}

    def batches(groups: Sequence[np.ndarray]) -> Iterator[Batch]:
        for rows in groups:
            yield rows, {layer: (rows_of(v, rows), rows_of(s, rows)) for layer, (v, s) in opened.items()}

    return batches


def raw_files(store: Store, folder: Path) -> dict[str, np.ndarray]:
    """Name -> memory map of an array in a file without header; files that do not exist are written."""
    folder.mkdir(exist_ok=True)
    for layer, pair in names(store.layers).items():
        if not (folder / pair[1]).exists():
            part = store.fetch("train", slice(None), [layer]).result()[layer]
            for name, values in zip(pair, (part.values, part.scale), strict=True):
                with (folder / name).open("wb") as file:
                    file.write(values.data)
    shape = (store.num_samples("train"), store.schema.token_layout.num_tokens)
    kinds = {"layer": (np.int8, (*shape, store.schema.dim)), "scale": (np.float32, shape)}
    found = sorted(file.name for file in folder.iterdir())
    return {name: np.memmap(folder / name, kinds[name[:5]][0], "r", shape=kinds[name[:5]][1]) for name in found}


def memmap(store: Store, folder: Path) -> Batches:
    """Fancy indexing of memory maps."""
    return by_layer(store, raw_files(store, folder / "raw").__getitem__, lambda array, rows: array[rows])


def memmap_kept(store: Store, folder: Path) -> Batches:
    """Copy into the same arrays for every batch: the lower bound, if only one batch is needed at a time."""
    kept: dict[tuple[int, int], np.ndarray] = {}

    def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = kept.setdefault((id(array), len(rows)), np.empty((len(rows), *array.shape[1:]), array.dtype))
        return np.take(array, rows, axis=0, out=out, mode="clip")

    return by_layer(store, raw_files(store, folder / "raw").__getitem__, take)


def tensorstore(store: Store, folder: Path) -> Batches:
    """tensorstore, which reads all arrays of a batch concurrently."""

    def opened(name: str) -> ts.TensorStore:
        return ts.open({"driver": "zarr3", "kvstore": f"{store.url}train/{name}/"}, open=True).result()

    started = by_layer(store, opened, lambda array, rows: array[rows].read())

    def batches(groups: Sequence[np.ndarray]) -> Iterator[Batch]:
        for rows, found in started(groups):
            yield rows, {layer: (values.result(), scale.result()) for layer, (values, scale) in found.items()}

    return batches


def zarr_python(store: Store, folder: Path) -> Batches:
    """zarr-python."""
    group: Any = zarr.open_group(f"{store.url}train", mode="r")
    return by_layer(store, group.__getitem__, lambda array, rows: array.oindex[rows])


def zarrs(store: Store, folder: Path) -> Batches:
    """zarr-python with the codec pipeline of zarrs."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr_python(store, folder)


def h5py(store: Store, folder: Path) -> Batches:
    """One contiguous array per layer, rows in ascending order: the fastest way to read HDF5."""
    import h5py

    with h5py.File(folder / "tokens.h5", "w") as file:
        for name, values in raw_files(store, folder / "raw").items():
            file[name] = values
    opened = h5py.File(folder / "tokens.h5", "r")

    def rows_of(array: Any, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(rows)
        found = np.empty((len(rows), *array.shape[1:]), array.dtype)
        found[order] = array[rows[order]]
        return found

    return by_layer(store, opened.__getitem__, rows_of)


def samples(store: Store, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All layers of every sample: (layers, tokens, dim) and (layers, tokens)."""
    raw = raw_files(store, folder / "raw")
    pairs = names(store.layers).values()
    for row in range(store.num_samples("train")):
        yield np.stack([raw[v][row] for v, _ in pairs]), np.stack([raw[s][row] for _, s in pairs])


def by_sample(store: Store, sample: Callable[[int], tuple[Any, Any]]) -> Batches:
    """A reader of one sample after the other."""

    def batches(groups: Sequence[np.ndarray]) -> Iterator[Batch]:
        for rows in groups:
            yield stacked(store, rows, [sample(row) for row in rows.tolist()])

    return batches


def stacked(store: Store, rows: np.ndarray, found: Sequence[tuple[Any, Any]]) -> Batch:
    """Stack samples to a batch."""
    parts = {k: (np.stack([v[k] for v, _ in found]), np.stack([s[k] for _, s in found])) for k in store.layers}
    return rows, parts


def npy_files(store: Store, folder: Path) -> Batches:
    """Two .npy files per sample, for values and scales."""
    (folder / "npy").mkdir()
    for row, (values, scale) in enumerate(samples(store, folder)):
        np.save(folder / f"npy/{row}.values.npy", values)
        np.save(folder / f"npy/{row}.scale.npy", scale)
    paths = str(folder / "npy")
    return by_sample(store, lambda row: (np.load(f"{paths}/{row}.values.npy"), np.load(f"{paths}/{row}.scale.npy")))


def pt_files(store: Store, folder: Path) -> Batches:
    """One .pt file per sample."""
    (folder / "pt").mkdir()
    for row, pair in enumerate(samples(store, folder)):
        torch.save([torch.from_numpy(part) for part in pair], folder / f"pt/{row}.pt")

    def load(row: int) -> tuple[np.ndarray, np.ndarray]:
        values, scale = torch.load(folder / f"pt/{row}.pt", weights_only=True)
        return values.numpy(), scale.numpy()

    return by_sample(store, load)


def litdata(store: Store, folder: Path) -> Batches:
    """litdata, in chunks of 64 MB."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for row, (values, scale) in enumerate(samples(store, folder)):
        writer[row] = {"values": values, "scale": scale}
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(folder / "litdata"))
    return by_sample(store, lambda row: (dataset[row]["values"], dataset[row]["scale"]))


def webdataset(store: Store, folder: Path) -> Batches:
    """Tar files of 256 samples, read sequentially and shuffled in a window of 256."""
    import webdataset as wds

    (folder / "tars").mkdir()
    with wds.ShardWriter(f"{folder}/tars/%05d.tar", maxcount=256, verbose=0) as writer:
        for row, (values, scale) in enumerate(samples(store, folder)):
            writer.write({"__key__": f"{row:08d}", "values": values.tobytes(), "scale": scale.tobytes()})
    tars = sorted(str(path) for path in (folder / "tars").iterdir())
    shape = (len(store.layers), store.schema.token_layout.num_tokens)

    def parts(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        values = np.frombuffer(sample["values"], np.int8).reshape(*shape, store.schema.dim)
        return values, np.frombuffer(sample["scale"], np.float32).reshape(shape)

    def batches(groups: Sequence[np.ndarray]) -> Iterator[Batch]:
        found = iter(wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(256))
        for group in groups:
            drawn = [next(found) for _ in group]
            yield stacked(store, np.array([int(s["__key__"]) for s in drawn]), [parts(s) for s in drawn])

    return batches


READERS: dict[str, Callable[[Store, Path], Batches]] = {
    SIDECACHE: lambda store, folder: sidecache(store),
    f"{SIDECACHE}, first pass": lambda store, folder: sidecache_first_pass(store),
    MEMMAP: memmap,
    KEPT: memmap_kept,
    "tensorstore": tensorstore,
    "zarr-python": zarr_python,
    "zarrs": zarrs,
    "h5py": h5py,
    "litdata": litdata,
    "webdataset": webdataset,
    "one .npy a sample": npy_files,
    "one .pt a sample": pt_files,
}
OPTIONAL = ("zarrs", "h5py", "litdata", "webdataset")  # libraries that may not be installed
