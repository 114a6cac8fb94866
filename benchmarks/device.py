"""Compares a device with its limits: `python -m benchmarks.device extraction transfer --device cuda --out FILE`.

extraction  Images go through --model with random weights in bfloat16 autocast; the tokens of all layers are encoded to
            int8 and copied to the host, as in `sidecache extract` without decoding and writing. In operations per
            second, compared with one large bfloat16 matrix product. The batch is what `extract.batch_size: auto` finds
            for shards of 256 samples.
transfer    Stored int8 tokens of that model are copied to the device and decoded to float32, as in training from the
            cache. Compared with plain copies of the same bytes from pinned memory (on a CPU, from ordinary memory).

A measurement repeats its call --repeats times, as calls may overlap in a job. Figures are medians over --rounds, in
turns. `--small` is a tiny model, to test the script.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapt.features.cached import StreamedFeatures
from benchmarks.made_up import StoreShape, write_store
from benchmarks.record import add_record_options, machine, save
from extract.backbones.backbone import Backbone, empty_backbone, load_backbone
from extract.config import BackboneConfig, ExtractConfig
from extract.forward.device import configure_process, synchronize
from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import FrozenForward
from store.reader import Store

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 2}
_LARGEST_BATCH = 64  # of shards of 256 samples


class Clock:
    """Measures calls on a device, until all of their work is done."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def medians(self, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Median seconds of each call, in turns, after a warm-up round."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                seconds[name].append(self._seconds(call))
        return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}

    def _seconds(self, call: Callable[[], object]) -> float:
        synchronize(self._device)
        started, last = time.perf_counter(), None
        for _ in range(self._repeats):
            last, previous = call(), last  # the new call runs while the previous result is awaited
            if isinstance(previous, Encoding):
                previous.result()
        if isinstance(last, Encoding):
            last.result()
        synchronize(self._device)
        return (time.perf_counter() - started) / self._repeats


def extraction(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the forward pass with encoding, beside a matrix product."""
    device = torch.device(args.device)
    backbone = _backbone(args)
    layers = range(backbone.depth)
    forward = FrozenForward(backbone, layers, "all", ExtractConfig(device=args.device, precision="bfloat16"))
    batch = args.batch or forward.batch_size(_LARGEST_BATCH)
    images = torch.randn(batch, *backbone.image_size, device=device)
    rms = {layer: torch.ones(backbone.dim, device=device) for layer in layers}
    side = 512 if args.small else 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        forward(images[:1])
    seconds = Clock(device, args.repeats).medians(
        {
            "extraction": lambda: Encoding(forward(images), [""] * batch, "int8", rms),
            "forward": lambda: forward(images),
            "matmul": lambda: left @ right,
        },
        args.rounds,
    )
    work = {
        "extraction": batch * counter.get_total_flops(),
        "forward": batch * counter.get_total_flops(),
        "matmul": 2 * side**3,
    }
    rates = {name: work[name] / taken for name, taken in seconds.items()}
    return {
        "model": args.model,
        "batch": batch,
        "images_per_second": batch / seconds["extraction"],
        "operations_per_second": rates,
        "extraction / matmul": rates["extraction"] / rates["matmul"],
        "forward / matmul": rates["forward"] / rates["matmul"],
    }


def transfer(args: argparse.Namespace) -> dict[str, Any]:
    """Measure transfer and decoding, beside plain copies."""
    device, shape = torch.device(args.device), empty_backbone(args.model, {"img_size": 224, **_size(args)})
    grid = (shape.layout.grid[-2], shape.layout.grid[-1])
    store = write_store(
        args.folder / "transfer.zarr", StoreShape(samples=args.samples, layers=1, grid=grid, dim=shape.dim)
    )
    features, layer = StreamedFeatures(store, device), store.layers[0]
    values, scale = _stored(store)
    plain = values.pin_memory() if device.type == "cuda" else values.clone()
    target = torch.empty_like(plain, device=device)
    seconds = Clock(device, args.repeats).medians(
        {
            "transfer and decoding": lambda: features.decode(layer, values, scale),
            "copy": lambda: target.copy_(plain, non_blocking=True),
        },
        args.rounds,
    )
    rates = {name: values.nbytes / taken for name, taken in seconds.items()}
    return {
        "bytes": values.nbytes,
        "bytes_per_second": rates,
        "transfer and decoding / copy": rates["transfer and decoding"] / rates["copy"],
    }


def _backbone(args: argparse.Namespace) -> Backbone:
    return load_backbone(BackboneConfig(name=args.model, weights="random", image_size=224, model_kwargs=_size(args)))


def _size(args: argparse.Namespace) -> dict[str, Any]:
    return SMALL if args.small else {}


def _stored(store: Store) -> tuple[Tensor, Tensor]:
    encoded = store.fetch("train", np.arange(store.num_samples("train"))).result()[store.layers[0]]
    assert encoded.scale is not None
    return torch.from_numpy(encoded.values), torch.from_numpy(encoded.scale)


PARTS = {"extraction": extraction, "transfer": transfer}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="vit_giant_patch14_dinov2", help="a timm ViT")
    parser.add_argument("--batch", type=int, help="images at once; found automatically by default")
    parser.add_argument("--samples", type=int, default=512, help="of `transfer`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=8, help="calls of a measurement")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="for the temporary store")
    add_record_options(parser)
    return parser.parse_args(words)


def main() -> None:
    """Run the benchmark of the command line."""
    args = parse()
    configure_process()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        args.folder = Path(scratch)
        save({**machine(), **{part: PARTS[part](args) for part in args.parts}}, args.out)


if __name__ == "__main__":
    main()
