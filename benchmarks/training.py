"""Compares training from the store with end-to-end training: `python -m benchmarks.training speed presets rows memory`.

Parts can be run separately, and speed with either --precision; figures of other parts that --out holds are kept.

speed   Training samples per second, on made-up photographs of 224 pixels and a --model with random weights: LoSA with
        its default options, streamed from an int8 store of all layers and tokens, and resident; the same LoSA online,
        and with rank 16; our `lora`; `full`; all by the training loop of sidecache (adapt/training/loop.py); and
        peft's LoRA in a plain loop over the same batches of images. Same batch size and precision, in one process,
        medians over interleaved rounds. A round of LoSA from the store is several batches, of the others one batch.
        On a GPU: `--device cuda --model vit_giant_patch14_dinov2 --precision bfloat16 --batch 64`. `cpu_seconds`
        is the CPU time of all threads, which other work on the machine disturbs less.
memory  The same at batch size 64, each in a separate process: the peak resident memory while it opens its inputs,
        builds its model and takes one step, minus the memory of the process with everything imported. The loop of
        sidecache splits a batch into parts that fit into memory; the plain loop around peft's model does not.
presets Samples a second of LoSA, streamed from stores of three presets (made-up tokens in the shape of the
        --model's), relative to peft's LoRA end to end: same batch size, precision and threads. `--batch 32`.
rows    Seconds of an epoch of LoSA, streamed from the page cache, for 1,024 rows, for twice as many, and so on, of
        small tokens (4 layers, 50 tokens, 192 wide), and the peak memory of the process during each. Needs 1.3 GB of
        disk in --folder.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapt.features.cached import StreamedFeatures
from adapt.job.cost import peak_memory
from benchmarks.contestants import (
    CONTESTANTS,
    FROM_CACHE,
    FROM_STORE,
    NARROW,
    ONLINE,
    PEFT,
    RESIDENT,
    SMALL,
    WIDE_LOSA,
    Bench,
    Contestant,
    Epochs,
    build,
)
from benchmarks.made_up import StoreShape, write_store
from benchmarks.record import add_record_options, machine, save
from extract.backbones.backbone import empty_backbone
from extract.forward.device import configure_process
from store.config import StoreConfig
from store.layout import reduced_layout, resolve_layers

_PAIRS = [(ours, theirs) for ours in (FROM_CACHE, RESIDENT) for theirs in (PEFT, "lora", "full", ONLINE)]
RATIOS = {f"{ours} / {theirs}": (ours, theirs) for ours, theirs in [*_PAIRS, (NARROW, PEFT)]}


def compare(epochs: Mapping[str, Epochs], rounds: int) -> dict[str, dict[str, Any]]:
    """Wall-clock and CPU seconds of each in every round, in rotating order, after one warm-up round."""
    names, figures = list(epochs), {name: {"seconds": [], "cpu_seconds": []} for name in epochs}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter(), time.process_time()
            epochs[name].run()
            if number:
                figures[name]["seconds"].append(time.perf_counter() - started[0])
                figures[name]["cpu_seconds"].append(time.process_time() - started[1])
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return {name: {"samples": epochs[name].rows, **taken} for name, taken in figures.items()}


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the part `speed`."""
    bench = Bench(folder, args.batch * args.batches, args)
    bench.extract()
    epochs = {}
    for name in CONTESTANTS:
        count = args.batch * (args.batches if name in FROM_STORE else 1)
        epochs[name] = Epochs(bench.contestant(name), count, args.batch, precision=args.precision)
    figures = compare(epochs, args.rounds)
    for taken in figures.values():
        for clock in ("seconds", "cpu_seconds"):
            taken[f"samples / {clock[:-1]}"] = taken["samples"] / statistics.median(taken[clock])
    ratios = {name: _ratio(figures, ours, theirs) for name, (ours, theirs) in RATIOS.items()}
    return {"figures": figures, "ratios, medians of the rounds' own": ratios}


def presets(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the part `presets`."""
    bench = Bench(folder, args.batch, args)
    backbone = empty_backbone(args.model, SMALL if args.small else {}, None)
    epochs = {PEFT: Epochs(bench.contestant(PEFT), args.batch, args.batch, precision=args.precision)}
    for preset, token_rank in (("lean", 0), ("lean", 32), ("coarse", 32), ("grid", 32)):
        stored = StoreConfig(preset=preset)  # type: ignore[call-arg, arg-type]
        grid = reduced_layout(backbone.layout, stored.tokens).grid
        shape = StoreShape(
            samples=args.batch * {"lean": 32, "coarse": 4, "grid": 1}[preset],
            layers=len(resolve_layers(stored.layers, backbone.depth)),
            grid=(grid[0], grid[1]),
            dim=backbone.dim,
        )
        streamed = StreamedFeatures(write_store(folder / f"{preset}-{token_rank}.zarr", shape), bench.device)
        contestant = Contestant(build("losa", streamed.spec, token_rank=token_rank), streamed, "losa")
        name = f"losa from {preset}, token rank {token_rank}"
        epochs[name] = Epochs(contestant, shape.samples, args.batch, precision=args.precision)
    figures = compare(epochs, args.rounds)
    ratios = {name: _ratio(figures, name, PEFT) for name in figures if name != PEFT}
    return {"figures": figures, "ratios, medians of the rounds' own": ratios}


def _ratio(figures: Mapping[str, dict[str, Any]], ours: str, theirs: str) -> dict[str, float]:
    """Samples a second of one relative to another's, the median of the rounds, by clock."""
    mine, other = figures[ours], figures[theirs]
    return {
        clock: statistics.median(
            (mine["samples"] / m) / (other["samples"] / o) for m, o in zip(mine[clock], other[clock], strict=True)
        )
        for clock in ("seconds", "cpu_seconds")
    }


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the part `memory`, one process after the other."""
    Bench(folder, args.memory_batch, args).extract()
    gc.collect()
    torch.cuda.empty_cache()  # leaves it to the processes below
    bytes_above = {}
    for name in args.only or CONTESTANTS:
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--child", name, "--folder", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        bytes_above[name] = json.loads(done.stdout.splitlines()[-1])
    theirs = bytes_above.get(PEFT)
    ratios = {name: n_bytes / theirs for name, n_bytes in bytes_above.items()} if theirs else {}
    return {"bytes_above_the_interpreter": bytes_above, "ratio_to_peft_lora": ratios}


def measure_peak(args: argparse.Namespace, folder: Path) -> int:
    """Peak memory of this process above what it uses now."""
    with peak_memory(torch.device(args.device)) as peak:
        contestant = Bench(folder, 0, args).contestant(args.child)
        Epochs(contestant, args.memory_batch, args.memory_batch, precision=args.precision).run()
    assert peak.n_bytes is not None
    return peak.n_bytes


def rows(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the part `rows`: epochs over the first rows of one store, for every size."""
    sizes = [1024 * 2**power for power in range(args.doublings + 1)]
    store = write_store(folder / "rows.zarr", StoreShape(samples=sizes[-1], layers=4, grid=(7, 7), dim=192))
    peaks: dict[str, int] = {}
    epochs, device = {}, torch.device(args.device)
    for size in sizes:
        streamed = StreamedFeatures(store, device)
        contestant = Contestant(build("losa", streamed.spec, **WIDE_LOSA), streamed, "losa")
        epochs[str(size)] = Epochs(contestant, size, 256, precision=args.precision)
    figures = compare(epochs, args.rounds)
    for name, each in epochs.items():
        with peak_memory(device) as peak:
            each.run()
        assert peak.n_bytes is not None
        peaks[name] = peak.n_bytes
    by_clock = {
        clock: {name: statistics.median(taken[clock]) / taken["samples"] for name, taken in figures.items()}
        for clock in ("seconds", "cpu_seconds")
    }
    relative = {
        clock: {name: value / per_row[str(sizes[0])] for name, value in per_row.items()}
        for clock, per_row in by_clock.items()
    }
    return {"figures": figures, "per_row": by_clock, "per_row / that of the first": relative, "peak_bytes": peaks}


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "speed": speed,
    "presets": presets,
    "memory": memory,
    "rows": rows,
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="of a round of LoSA from the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-batch", type=int, default=64)
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="of `memory`")
    parser.add_argument("--doublings", type=int, default=5, help="of `rows`, from 1,024")
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="folder for temporary stores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_record_options(parser)
    return parser.parse_args(words)


def main() -> None:
    """Measure the parts, and save the figures after each."""
    args = parse()
    configure_process()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.child:
        print(measure_peak(args, args.folder))
        return
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "folder", "child", "parts")}
    document: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for part in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            found = PARTS[part](args, Path(scratch))
        document[f"{part}, {args.precision}"] = {**machine(), "settings": settings, **found}
        save(document, args.out)


if __name__ == "__main__":
    main()
