"""Compares extraction with loops that write nothing: `python -m benchmarks.extracting examples/rsscn7.yaml --out FILE`.

In every round the same images go through (a) `sidecache extract` into a new store, with digests of all files,
checksums, encoding and durable commits; (b) the same decoding and forward pass without storing the tokens; (c) a bare
timm loop: a DataLoader of two workers, timm's transform, `forward_features`, in the same precision. All run in one
process, in alternating order; the figure is images per second, the median over the rounds. Then a shard of that store
is written by `StoreWriter` and, the same bytes, to one raw file; both are durable before the clock stops.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from benchmarks.made_up import encode
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.backbones.backbone import Backbone, load_backbone
from extract.forward.device import autocast, configure_process, synchronize
from extract.forward.frozen_forward import FrozenForward
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import ImageSource, open_source
from store.address import store_url
from store.arrays import open_schema, read_rms
from store.dtypes import Encoded
from store.kvstore import KeyValueStore
from store.layout import in_groups, resolve_layers
from store.writer import StoreWriter

WORKERS = 2  # of the bare loop's DataLoader


class Pixels(Dataset[torch.Tensor]):
    """The transformed images of a split."""

    def __init__(self, split: Any, transform: Any) -> None:
        self._split, self._transform = split, transform

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.as_tensor(self._transform(self._split[row]))


def extract(config: Config, source: ImageSource, backbone: Backbone, store: Path) -> None:
    """Extract to a new store."""
    stored = config.store.model_copy(update={"path": str(store)})
    job = ExtractionJob(source=source, backbone=backbone, data=config.data, store=stored, extract=config.extract)
    extract_tokens(job)


def forward_only(source: ImageSource, forward: FrozenForward, batch_size: int) -> None:
    """Decode and forward all images; the tokens are dropped."""
    for split in source.splits.values():
        for batch in forward.batches(split, in_groups(range(len(split)), batch_size)):
            assert batch.images is not None
            forward(batch.images)
    synchronize(forward.device)


def bare_loop(source: ImageSource, forward: FrozenForward, batch_size: int) -> None:
    """Forward all images with a torch DataLoader and timm alone."""
    backbone, device = forward.backbone, forward.device
    pixels = ConcatDataset([Pixels(split, backbone.transform) for split in source.splits.values()])
    loader = DataLoader(
        pixels,
        batch_size,
        num_workers=WORKERS,
        multiprocessing_context="forkserver",
        pin_memory=device.type == "cuda",
    )
    with torch.inference_mode(), autocast(device, forward.precision):
        for images in loader:
            backbone.module.forward_features(images.to(device, non_blocking=True))  # type: ignore[operator]
    synchronize(device)


def writing(store: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds to overwrite the first shard of a store, and to write the same bytes to a raw file."""
    kvstore = KeyValueStore(store_url(store))
    schema = open_schema(kvstore)
    assert schema is not None
    rms, draw = read_rms(kvstore, schema), np.random.default_rng(0)
    rows = len(schema.shards("train").rows(0))
    shape = (rows, schema.token_layout.num_tokens, schema.dim)
    tokens = {k: encode(draw.normal(size=shape).astype(np.float32), schema.dtype, rms.get(k)) for k in schema.layers}
    status, writer = np.ones(rows, np.uint8), StoreWriter(kvstore, schema)
    raw = store.parent / "raw.bin"
    return compare(
        {"store": lambda: writer.commit("train", 0, tokens, status), "raw": lambda: write_raw(raw, tokens)}, rounds
    )


def write_raw(path: Path, tokens: Mapping[int, Encoded]) -> None:
    """Write encoded tokens to one file, and sync it."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for encoded in tokens.values():
            file.write(np.ascontiguousarray(encoded.values).data)
            if encoded.scale is not None:
                file.write(np.ascontiguousarray(encoded.scale).data)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="SECTION.KEY=VALUE, as of sidecache")
    parser.add_argument("--rounds", type=int, default=5)
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    config = load_config(args.config, args.overrides)
    source, backbone = open_source(config.data), load_backbone(config.backbone, config.data.clips)
    forward = FrozenForward(
        backbone, resolve_layers(config.store.layers, backbone.depth), config.store.tokens, config.extract
    )
    batch_size = forward.batch_size(config.store.shard_samples)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "cache.zarr"
        contestants = {
            "sidecache": lambda: extract(config, source, backbone, store),
            "forward only": lambda: forward_only(source, forward, batch_size),
            "bare timm": lambda: bare_loop(source, forward, batch_size),
        }
        before = {"sidecache": lambda: shutil.rmtree(store, ignore_errors=True)}
        seconds = compare(contestants, args.rounds, before)
        written = writing(store, args.rounds)
    n = sum(len(split) for split in source.splits.values())
    rates = {name: n / statistics.median(values) for name, values in seconds.items()}
    write_seconds = {name: statistics.median(values) for name, values in written.items()}
    figures = {
        "images": n,
        "backbone": backbone.name,
        "dtype": config.store.dtype,
        "rounds": args.rounds,
        "images_per_second": rates,
        "sidecache / forward only": rates["sidecache"] / rates["forward only"],
        "sidecache / bare timm": rates["sidecache"] / rates["bare timm"],
        "write_seconds": write_seconds,
        "store write / raw write": write_seconds["raw"] / write_seconds["store"],
    }
    save({**machine(), **figures}, args.out)


if __name__ == "__main__":
    main()
