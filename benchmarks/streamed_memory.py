"""Memory of streamed training: `python benchmarks/streamed_memory.py --gib 8`.

Writes a store of made-up ViT-B/16 tokens of at least that size, trains LoSA from it streamed, and prints how far the
process rose above its memory when idle (everything imported, nothing opened).
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adapt.config import MethodConfig, Trial
from adapt.cost import peak_memory
from adapt.features import StreamedFeatures
from adapt.losa import LoSAOptions
from adapt.pooled import PooledFeatures
from adapt.search import Material, train_trials
from adapt.train import Settings
from store.address import store_url
from store.arrays import STORED
from store.backend import Folder
from store.formats import Encoded
from store.reader import open_store
from store.schema import FORMAT_VERSION, Provenance, Schema, SplitInfo
from store.writer import Listing, StoreWriter, create_store

LAYERS, TOKENS, DIM, SHARD = 12, 197, 768, 64


def write_store(folder: Path, num_samples: int) -> None:
    """A whole store of random float16 tokens, one shard after the other."""
    provenance = Provenance(
        backbone="made-up",
        model_kwargs={},
        weights_digest="",
        image_size=(3, 224, 224),
        preprocessing="",
        preprocessing_digest="",
        tokens="all",
        dtype="float16",
        precision="float32",
        samples={},
        extraction_version=1,
    )
    schema = Schema(
        format_version=FORMAT_VERSION,
        dataset="made-up",
        classes=("a", "b"),
        multi_label=False,
        splits={"train": SplitInfo(num_samples=num_samples)},
        depth=LAYERS,
        layers=tuple(range(LAYERS)),
        dim=DIM,
        num_prefix_tokens=1,
        grid=(14, 14),
        shard_samples=SHARD,
        compressor=None,
        provenance=provenance,
        tail_tensors=(),
    )
    ids = tuple(f"{row:06d}" for row in range(num_samples))
    listing = Listing(ids, np.arange(num_samples) % 2, np.zeros((num_samples, 16), np.uint8))
    store = Folder(store_url(folder))
    create_store(store, schema, {"train": listing}, {}, {})
    writer, draw = StoreWriter(store, schema), np.random.default_rng(0)
    for shard in schema.shards("train"):
        rows = schema.shards("train").rows(shard)
        values = draw.standard_normal((len(rows), TOKENS, DIM), np.float32).astype(np.float16)
        tokens = {layer: Encoded(values) for layer in range(LAYERS)}
        writer.commit("train", shard, tokens, np.full(len(rows), STORED, np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--samples-trained", type=int, default=512, help="of the store, drawn from all of it")
    args = parser.parse_args()
    num_samples = int(args.gib * 2**30 / (LAYERS * TOKENS * DIM * 2)) + 1
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        folder = Path(scratch) / "cache.zarr"
        write_store(folder, num_samples)
        with peak_memory(torch.device("cpu")) as idle:
            time.sleep(0.1)
        with peak_memory(torch.device("cpu")) as peak:
            store = open_store(folder)
            features = StreamedFeatures(store, torch.device("cpu"))
            trial = Trial(options=LoSAOptions(), lr=0.001, weight_decay=0.01)
            method = MethodConfig(name="losa", epochs=1, batch_size=64, trials=(trial,))
            fraction = min(1 - args.samples_trained / num_samples, 0.9)
            trained = train_trials(method, [trial], Material(PooledFeatures(features)), Settings(1, 64, 0), fraction)
        print(
            f"store {store.n_bytes() / 2**30:.2f} GiB, {num_samples} samples; batch 64 in parts of "
            f"{features.samples_at_once(store.layers)}, {trained.samples_per_second:.1f} samples a second"
        )
        assert idle.n_bytes is not None
        assert peak.n_bytes is not None
        print(
            f"idle {idle.n_bytes / 2**20:.0f} MiB, peak {peak.n_bytes / 2**20:.0f} MiB, "
            f"above idle {(peak.n_bytes - idle.n_bytes) / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
