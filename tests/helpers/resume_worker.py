"""Runs a small extraction in a forked process, which can be killed and run again.

A process that has imported everything, but has not used a store, forks for every run, since imports take far longer
than the extraction. benchmarks/torture.py uses this module. test_resume.py starts
`python resume_worker.py IMAGES STORES DTYPE [MORE]`, which kills some runs, resumes them, and prints a JSON document.
With MORE, a folder of further images, the runs grow a store that has one layer of the first images.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import dask
import torch
from write_trace import FILE, trace_writes

from extract.backbones.backbone import TimmBackbone, load_backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store.address import store_url
from store.config import Layers, StoreConfig
from store.growing.growth import read_known
from store.kvstore import KeyValueStore

RECIPE = BackboneConfig(
    name="vit_tiny_patch16_224",
    weights="random",
    image_size=32,
    model_kwargs={"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
)
INTERRUPTED = 130


@dataclass(frozen=True)
class Run:
    """A forked run: its process, and the pipe to which it writes the number of shards."""

    process: int
    pipe: int

    def has_ended(self) -> bool:
        """Whether the process has ended; it stays a zombie until `finish`."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self) -> tuple[int, int]:
        """Exit status (negative: killed by that signal), and shards written (-1 if it was killed)."""
        with os.fdopen(self.pipe) as pipe:
            written = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), int(written or -1)


@dataclass(frozen=True)
class Job:
    """An extraction of images to shards of two."""

    images: Path
    dtype: str
    backbone: TimmBackbone
    layers: Layers = "all"
    workers: int = 1

    def extract(self, store: Path) -> int:
        """Run the job in this process; returns the number of shards written."""
        data = DataConfig(source="folder", root=self.images)
        stored = StoreConfig(path=str(store), dtype=self.dtype, shard_samples=2, layers=self.layers)  # type: ignore[arg-type]
        config = ExtractConfig(batch_size=1, device="cpu", workers=self.workers)
        source = open_source(data, read_known(KeyValueStore(store_url(store))))
        job = ExtractionJob(
            source=source, backbone=self.backbone, data=data, store=stored, extract=config, backbone_config=RECIPE
        )
        return extract_tokens(job).shards_written

    def start(self, store: Path, trace: Path | None = None) -> Run:
        """Fork a run; all its processes trace their writes to `trace`."""
        read_end, write_end = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                if trace is not None:
                    _trace_all(trace)
                os.write(write_end, str(self.extract(store)).encode())
                status = 0
            except KeyboardInterrupt:
                status = INTERRUPTED
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write_end)
        return Run(process, read_end)


def _trace_all(path: Path) -> None:
    trace_writes(path)
    os.environ[FILE] = str(path)
    dask.config.set({"distributed.worker.preload": ["write_trace"]})


def load_tiny() -> TimmBackbone:
    """A ViT of 3 blocks, 32 wide."""
    torch.set_num_threads(1)
    return load_backbone(RECIPE)


def committed(store: Path) -> int:
    """The number of files of marks."""
    return sum(1 for mark in store.glob("*/status/c/*") if mark.suffix != ".__lock")


def num_files(store: Path) -> int:
    """The number of files of a store that another process may be writing."""
    return sum(len(files) for _, _, files in os.walk(store))


def trial(job: Job, store: Path, stop: int, files: int) -> dict[str, object]:
    """Stop a run by a signal once its store has that many files, resume it, and describe both."""
    copy_base(store)
    run = job.start(store)
    while num_files(store) < files and not run.has_ended():
        time.sleep(0.001)
    os.kill(run.process, stop)
    status, _ = run.finish()
    before = committed(store)
    leftovers = [str(path.relative_to(store)) for path in store.rglob("*.__lock")]
    resumed, written = job.start(store).finish()
    facts = {"status": status, "committed": before, "resumed": resumed, "written": written}
    return {"store": str(store), "stop": stop, "leftovers": leftovers, **facts}


def copy_base(store: Path) -> None:
    """Copy the store that a run grows, if there is one."""
    if (base := store.with_name("base.zarr")).exists():
        shutil.copytree(base, store)


def main() -> None:
    """Run the trials and print them."""
    images, stores, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    job = Job(images, dtype, load_tiny())
    for more in sys.argv[4:]:
        replace(job, layers=[1]).start(stores / "base.zarr").finish()
        shutil.copytree(more, images, dirs_exist_ok=True)
    copy_base(whole := stores / "whole.zarr")
    first = num_files(whole)
    status, total = job.start(whole).finish()
    added, draw = num_files(whole) - first, random.Random(os.getpid())
    trials = [
        trial(job, stores / f"{k}.zarr", stop, first + round(added * draw.uniform(k / 6, (k + 1) / 6)))
        for k, stop in enumerate([*[signal.SIGKILL] * 5, signal.SIGINT])
    ]
    print(json.dumps({"status": status, "total": total, "trials": trials}))


if __name__ == "__main__":
    main()
