"""Runs one small extraction many times over, each in a forked process that is killed at some moment and then resumed.

test_resume.py starts it: `python resume_worker.py IMAGES STORES DTYPE`. It imports once and forks per run, before any
store has been used in this process: an import takes far longer than the extraction. Prints one JSON list.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from extract.backbone import TimmBackbone, load_backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.run import extract_tokens
from extract.sources import open_source
from store.config import StoreConfig

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
INTERRUPTED = 130


def extract(images: Path, store: Path, dtype: str, backbone: TimmBackbone) -> int:
    """The number of shards that one run wrote."""
    data = DataConfig(source="folder", root=images)
    stored = StoreConfig(path=str(store), dtype=dtype, shard_samples=2)  # type: ignore[arg-type]
    config = ExtractConfig(batch_size=1, device="cpu")
    return extract_tokens(open_source(data), backbone, data, stored, config).shards_written


def start(images: Path, store: Path, dtype: str, backbone: TimmBackbone) -> tuple[int, int]:
    """A forked run: its process and the pipe on which it says what it wrote."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.write(write_end, str(extract(images, store, dtype, backbone)).encode())
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            os._exit(status)
    os.close(write_end)
    return process, read_end


def finish(process: int, read_end: int) -> tuple[int, int]:
    """Exit status (negative: killed by that signal), and shards written if it came to an end."""
    with os.fdopen(read_end) as pipe:
        written = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), int(written or -1)


def committed(store: Path) -> int:
    return sum(1 for mark in store.glob("*/status/c/*") if mark.suffix != ".__lock")


def trial(
    images: Path, store: Path, dtype: str, backbone: TimmBackbone, stop: int, seconds: float
) -> dict[str, object]:
    process, pipe = start(images, store, dtype, backbone)
    time.sleep(seconds)
    os.kill(process, stop)
    status, _ = finish(process, pipe)
    before = committed(store)
    leftovers = [str(path.relative_to(store)) for path in store.rglob("*.__lock")]
    resumed, written = finish(*start(images, store, dtype, backbone))
    facts = {"status": status, "committed": before, "resumed": resumed, "written": written}
    return {"store": str(store), "stop": stop, "leftovers": leftovers, **facts}


def main() -> None:
    images, stores, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    backbone = load_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", weights="random", image_size=32, model_kwargs=dict(TINY))
    )
    started = time.perf_counter()
    status, total = finish(*start(images, stores / "whole.zarr", dtype, backbone))
    seconds = time.perf_counter() - started
    draw = random.Random(os.getpid())
    trials = [
        trial(images, stores / f"{k}.zarr", dtype, backbone, stop, seconds * draw.uniform(k / 6, (k + 1) / 6))
        for k, stop in enumerate([*[signal.SIGKILL] * 5, signal.SIGINT])
    ]
    print(json.dumps({"status": status, "total": total, "seconds": seconds, "trials": trials}))


if __name__ == "__main__":
    main()
