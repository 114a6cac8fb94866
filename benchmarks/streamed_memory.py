"""Memory of streamed training: `python -m benchmarks.streamed_memory --gib 8`.

Writes a store of random ViT-B/16 tokens of at least that size, trains LoSA from it with streamed features, and prints
the peak memory above that of the idle process, which has imported everything and opened nothing.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from adapt.config.trials import Trial
from adapt.features.cached import StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.cost import peak_memory
from adapt.methods.from_features.losa import LoSAOptions
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.made_up import StoreShape, write_store
from benchmarks.record import add_record_options, machine, save
from extract.forward.device import configure_process
from store.reader import open_store

LAYERS, GRID, DIM, SHARD = 12, (14, 14), 768, 64
TOKENS = 1 + 14 * 14


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--samples-trained", type=int, default=512, help="drawn from the whole store")
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    num_samples = int(args.gib * 2**30 / (LAYERS * TOKENS * DIM * 2)) + 1
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        folder = Path(scratch) / "cache.zarr"
        shape = StoreShape(samples=num_samples, layers=LAYERS, grid=GRID, dim=DIM, shard_samples=SHARD, dtype="float16")
        write_store(folder, shape)
        with peak_memory(torch.device("cpu")) as peak:
            store = open_store(folder)
            features = StreamedFeatures(store, torch.device("cpu"))
            trial = Trial(options=LoSAOptions(rank=64, token_rank=8, layers="all"), lr=0.001, weight_decay=0.01)
            entry = Entry(method="losa", trial=trial, seed=0, settings=Settings(epochs=1, batch_size=64))
            row_draw = RowDraw(val_fraction=min(1 - args.samples_trained / num_samples, 0.9))
            (trained,) = train_entries([entry], TrainingData(PooledFeatures(features)), row_draw)
        assert peak.n_bytes is not None
        figures = {
            "store_bytes": store.n_bytes(),
            "samples": num_samples,
            "samples_at_once": features.samples_at_once(store.layers),
            "samples_per_second": len(trained.data.rows) / trained.seconds,
            "bytes_above_idle": peak.n_bytes,
        }
    save({**machine(), **figures}, args.out)


if __name__ == "__main__":
    main()
