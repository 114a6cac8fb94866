"""Counts the trials an hour of end-to-end training with one and with two workers: `python -m benchmarks.workers`.

A job of --trials trials (LayerNorm and BitFit, from several seeds) on --samples made-up images of 64 pixels is trained
from the start in every round: in a process of one thread, and by `train.workers: 2` of one thread each. Starting the
workers belongs to their time. The store is extracted before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

import sidecache as sc
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare

_METHODS = ("layernorm", "bitfit")
_CLASSES, _SIZE = 4, 64


def make_images(root: Path, samples: int) -> None:
    """Write images of random pixels: `samples` to train on, a few to test on."""
    draw = np.random.default_rng(0)
    for split, n_images in (("train", samples), ("test", 2 * _CLASSES)):
        for number in range(n_images):
            folder = root / split / str(number % _CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (_SIZE, _SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def document(folder: Path, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The configuration of the job."""
    seeds = list(range(args.trials // len(_METHODS)))
    return {
        "run_dir": str(folder / f"run-{workers}"),
        "data": {"source": "folder", "root": str(folder / "images")},
        "backbone": {"name": args.model, "weights": "random", "image_size": _SIZE},
        "store": {"path": str(folder / "cache.zarr"), "layers": {"last": 1}},
        "train": {"epochs": args.epochs, "batch_size": 16, "seeds": seeds, "workers": workers},
        "methods": list(_METHODS),
    }


def train(job: dict[str, Any]) -> None:
    """Train all trials in a new process of one thread."""
    shutil.rmtree(job["run_dir"], ignore_errors=True)
    script = (
        "import json, sys, torch, sidecache as sc\n"
        "if __name__ == '__main__':\n"
        "    torch.set_num_threads(1)\n"
        "    sc.train(sc.load_config(json.loads(sys.argv[1])))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [sys.executable, file.name, json.dumps(job)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Compare one process with two workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    add_record_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images", args.samples)
        jobs = {f"{workers} workers": document(folder, args, workers) for workers in (1, 2)}
        sc.extract(sc.load_config(jobs["1 workers"]))
        seconds = compare({key: lambda job=job: train(job) for key, job in jobs.items()}, args.rounds)
    one, two = seconds.values()
    figures = {
        "trials": args.trials,
        "epochs": args.epochs,
        "samples": args.samples,
        "trials an hour": {key: args.trials * 3600 / median(taken) for key, taken in seconds.items()},
        "2 workers / 1": median(a / b for a, b in zip(one, two, strict=True)),
    }
    save({**machine(), "rounds": args.rounds, **figures}, args.out)


if __name__ == "__main__":
    main()
