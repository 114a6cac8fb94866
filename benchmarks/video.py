"""Compares extracting clips with a plain loop: `python -m benchmarks.video FOLDER [--weights FILE] [--memory 1000]`.

FOLDER holds real clips, also in subfolders. In every round the same clips go through (a) a plain loop: decord decodes
the frames, then the backbone's transform and forward pass run, and nothing is written; (b) `sidecache extract` into a
new store, with checksums and durable commits. Both run in one process, in alternating order; the result is clips per
second, the median over the rounds. `--memory N` then extracts N clips and prints the peak memory of the process and its
decoding workers in each quarter of the job.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import decord
import psutil
import torch
from PIL import Image

from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.backbones.backbone import load_backbone
from extract.config import BackboneConfig, ClipConfig, DataConfig, ExtractConfig
from extract.forward.device import configure_process
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store.config import StoreConfig

MODEL = "vit_tiny_patch16_224"


def lay_out(clips: Sequence[Path], root: Path) -> None:
    """Make a folder source of links to the clips, with two classes; two clips are its test split."""
    for number, clip in enumerate(clips):
        folder = root / ("test" if number < 2 else "train") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}{clip.suffix}").symlink_to(clip)


def plain_loop(clips: Sequence[Path], backbone: Any, frames: int) -> None:
    """Decode, transform and run the backbone, as a simple script does."""
    with torch.inference_mode():
        for clip in clips:
            reader = decord.VideoReader(str(clip))
            indices = [int((j + 0.5) / frames * len(reader)) for j in range(frames)]
            images = [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
            backbone.module.forward_features(torch.stack([backbone.transform(image) for image in images]))


def extract(root: Path, backbone: Any, frames: int) -> None:
    """The whole job, into a store that is thrown away."""
    data = DataConfig(source="video_folder", root=root, video=ClipConfig(frames=frames))
    store = root.parent / "cache.zarr"
    stored = StoreConfig(path=str(store), layers=[-1])
    job = ExtractionJob(source=open_source(data), backbone=backbone, data=data, store=stored, extract=ExtractConfig())
    extract_tokens(job)
    shutil.rmtree(store)


@contextmanager
def watched_memory(marks: list[tuple[float, int]]) -> Iterator[None]:
    """Append (seconds, bytes used by this process and its children) to `marks` ten times a second."""
    stop, started, parent = threading.Event(), time.perf_counter(), psutil.Process()

    def watch() -> None:
        while not stop.wait(0.1):
            total = 0
            for process in (parent, *parent.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            marks.append((time.perf_counter() - started, total))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def quarters(marks: Sequence[tuple[float, int]]) -> list[int]:
    """The peak memory of each quarter of the time, in MiB."""
    end = marks[-1][0]
    parts = [[used for at, used in marks if k * end / 4 <= at <= (k + 1) * end / 4] for k in range(4)]
    return [max(part) // 2**20 for part in parts]


def main() -> None:
    """Run the comparison and save its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="random", help="a checkpoint of vit_tiny_patch16_224")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=0, help="number of clips to extract while watching the memory")
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    found = sorted(args.folder.resolve().rglob("*.mp4"))
    backbone = load_backbone(BackboneConfig(name=MODEL, weights=args.weights), ClipConfig(frames=args.frames))
    image_backbone = load_backbone(BackboneConfig(name=MODEL, weights=args.weights))
    clips = found[:: max(1, len(found) // args.clips)][: args.clips]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        lay_out(clips, root)
        contestants = {
            "plain": lambda: plain_loop(clips, image_backbone, args.frames),
            "sidecache": lambda: extract(root, backbone, args.frames),
        }
        seconds = compare(contestants, args.rounds)
    rates = {name: len(clips) / statistics.median(values) for name, values in seconds.items()}
    figures: dict[str, Any] = {
        **machine(),
        "clips": len(clips),
        "frames": args.frames,
        "rounds": args.rounds,
        "clips_per_second": rates,
        "sidecache / plain": rates["sidecache"] / rates["plain"],
    }
    if args.memory:
        with tempfile.TemporaryDirectory() as scratch:
            root, marks = Path(scratch) / "clips", list[tuple[float, int]]()
            lay_out([found[number % len(found)] for number in range(args.memory)], root)
            with watched_memory(marks):
                extract(root, backbone, args.frames)
            figures |= {"memory_clips": args.memory, "memory_mib_by_quarter": quarters(marks)}
    save(figures, args.out)


if __name__ == "__main__":
    main()
