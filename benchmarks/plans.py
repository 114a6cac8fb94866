"""Compares what `sidecache plan` says with what then happens: `python -m benchmarks.plans --out FILE`.

Every case is a job of the embedded ViT on handwritten digits, or of a ViT-Tiny on aerial scenes (rsscn7, where
$SIDECACHE_DATA is set), with other methods, epochs, seeds or points, on the disk of this machine or on one that reads
and writes no faster than a rate. It is planned; then its extraction and training are run from every feature source that
the plan says is possible, each time in a new folder. A plan is right if no other source took less time than the one
that it calls the fastest, or at most a twentieth less. Printed are bytes and seconds of extraction and of the whole,
predicted divided by actual. Figures that FILE has are kept.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.planning.planner import make_plan
from benchmarks.record import machine
from benchmarks.tables import table
from extract.forward.device import configure_process

_LOSA = {"name": "losa", "rank": 16}
_PROBE = {"name": "linear_probe", "layers": "all", "sweep": {"weight_decay": [10.0 ** (-k / 2) for k in range(12)]}}
_FIVE = [_LOSA, "ladder", "conv_ladder", "attentive_probe", "last"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job.

    Args:
        methods: its section `methods:`.
        train: of its section `train:`, what differs from that of all cases.
        sections: other sections.
        photographs: whether its data are rsscn7, not digits.
        disk: megabytes a second that the disk reads and writes at most; None for as fast as it is.
    """

    methods: list[Any]
    train: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    photographs: bool = False
    disk: float | None = None

    def document(self, folder: str) -> dict[str, Any]:
        """The configuration in a folder."""
        job: dict[str, Any] = {
            "run_dir": f"{folder}/run",
            "store": {"path": f"{folder}/cache.zarr"},
            "train": {"batch_size": 32, "seeds": [0], "refit": False} | self.train,
            "data": {"source": "digits"},
            "backbone": {"weights": "extract/fractal_vit"},
            "methods": self.methods,
        }
        if self.photographs:
            data = os.environ["SIDECACHE_DATA"]
            weights = f"{data}/weights/vit_tiny_patch16_224_imagenet1k.safetensors"
            job["data"] = {"source": "folder", "root": f"{data}/images/rsscn7"}
            job["backbone"] = {"name": "vit_tiny_patch16_224", "weights": weights}
        for name, section in self.sections.items():
            job[name] = job[name] | section
        return job


def _rates(*rates: float) -> list[Any]:
    return [_LOSA | {"sweep": {"lr": list(rates)}}]


_INT8, _LEAN = {"store": {"dtype": "int8"}}, {"store": {"preset": "lean"}}
CASES = {
    "digits: LoSA, 8 epochs": Case(methods=[_LOSA], train={"epochs": 8}),
    "digits: LoSA, 8 epochs, 3 seeds": Case(methods=[_LOSA], train={"epochs": 8, "seeds": [0, 1, 2]}),
    "digits: LoSA, 4 rates": Case(methods=_rates(0.001, 0.003, 0.01, 0.03), train={"epochs": 4}),
    "digits: LoSA, 4 rates, halving": Case(
        methods=_rates(0.001, 0.003, 0.01, 0.03), train={"epochs": 6, "halving": {}}
    ),
    "digits: five methods": Case(methods=_FIVE, train={"epochs": 3}),
    "digits: efficient probe, refit": Case(methods=["efficient_probe"], train={"epochs": 6, "refit": True}),
    "rsscn7: probe, 12 decays": Case(methods=[_PROBE], photographs=True),
    "rsscn7: LoSA, 1 epoch": Case(methods=[_LOSA], train={"epochs": 1}, photographs=True),
    "rsscn7: LoSA, 6 epochs": Case(methods=[_LOSA], train={"epochs": 6}, photographs=True),
    "rsscn7: LoSA, 3 epochs, 3 seeds, int8": Case(
        methods=[_LOSA], train={"epochs": 3, "seeds": [0, 1, 2]}, sections=_INT8, photographs=True
    ),
    "rsscn7: LoSA, 4 rates, lean": Case(
        methods=_rates(0.001, 0.003, 0.01, 0.03), train={"epochs": 10}, sections=_LEAN, photographs=True
    ),
    "rsscn7: five methods, lean": Case(methods=_FIVE, train={"epochs": 10}, sections=_LEAN, photographs=True),
    "digits, 100 MB/s: LoSA, 8 epochs": Case(methods=[_LOSA], train={"epochs": 8}, disk=100),
    "digits, 20 MB/s: LoSA, 1 epoch": Case(methods=[_LOSA], train={"epochs": 1}, disk=20),
    "digits, 20 MB/s: LoSA, 8 epochs": Case(methods=[_LOSA], train={"epochs": 8}, disk=20),
    "digits, 10 MB/s: LoSA, 2 epochs": Case(methods=[_LOSA], train={"epochs": 2}, disk=10),
    "digits, 20 MB/s: LoSA, 2 epochs, int8": Case(methods=[_LOSA], train={"epochs": 2}, sections=_INT8, disk=20),
    "digits, 20 MB/s: five methods": Case(methods=_FIVE, train={"epochs": 3}, disk=20),
    "rsscn7, 20 MB/s: LoSA, 2 epochs": Case(methods=[_LOSA], train={"epochs": 2}, photographs=True, disk=20),
    "rsscn7, 2 MB/s: LoSA, 10 epochs, lean": Case(
        methods=[_LOSA], train={"epochs": 10}, sections=_LEAN, photographs=True, disk=2
    ),
}


@contextmanager
def slow_disk(rate: float | None) -> Iterator[None]:
    """Let the store read and write so many megabytes a second, all threads together."""
    lock = threading.Lock()

    def slowed(call: Callable[..., int]) -> Callable[..., int]:
        def wait(*args: Any) -> int:
            with lock:
                started = time.perf_counter()
                n_bytes = call(*args)
                assert rate is not None
                time.sleep(max(0.0, n_bytes / (rate * 1e6) - (time.perf_counter() - started)))
            return n_bytes

        return wait

    if rate is None:
        yield
        return
    with mock.patch.multiple(os, preadv=slowed(os.preadv), writev=slowed(os.writev)):
        yield


def run_from(case: Case, source: str) -> dict[str, float]:
    """Seconds of extraction and of the whole, and bytes of the store, of a job from a feature source."""
    with tempfile.TemporaryDirectory() as folder:
        document = case.document(folder)
        document["train"]["feature_source"] = source
        config = load_config(document)
        started, found = time.perf_counter(), dict[str, float]()
        if source != "online":
            extraction = sc.extract(config)
            found = {"extract": extraction.seconds, "bytes": float(extraction.store.n_bytes())}
        sc.train(config)
        return found | {"total": time.perf_counter() - started}


def measure(case: Case) -> dict[str, Any]:
    """The plan of a case, and what happened."""
    with tempfile.TemporaryDirectory() as folder, slow_disk(case.disk):
        plan = make_plan(load_config(case.document(folder)))
        actual = {source: run_from(case, source) for source in plan.total_seconds}
    return {
        "bytes": plan.store_bytes,
        "extract": plan.extract_seconds,
        "total": plan.total_seconds,
        "fastest": plan.fastest,
        "actual": actual,
    }


def is_right(case: dict[str, Any]) -> bool:
    """Whether no source was faster than the one that was called the fastest, or by a twentieth at most."""
    seconds = {source: taken["total"] for source, taken in case["actual"].items()}
    return bool(0.95 * seconds[case["fastest"]] <= min(seconds.values()))


def rows_of_table(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Predicted divided by actual, and the verdict on the choice."""
    rows = []
    for name, case in cases.items():
        cached = next(taken for source, taken in case["actual"].items() if source != "online")
        ratios = [case["bytes"] / cached["bytes"], case["extract"] / cached["extract"]]
        ratios += [case["total"][source] / case["actual"][source]["total"] for source in case["total"]]
        fastest = min(case["actual"], key=lambda source: case["actual"][source]["total"])
        verdict = "right" if is_right(case) else f"{fastest} was"
        rows.append([name, *(f"{ratio:.2f}" for ratio in ratios), case["fastest"], verdict])
    return ["case", "bytes", "extraction", *next(iter(cases.values()))["total"], "fastest", ""], rows


def main() -> None:
    """Measure what is missing, save after every case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, help="cases; all by default")
    args = parser.parse_args()
    configure_process()
    figures: dict[str, Any] = {**machine(), "cases": {}}
    if args.out.exists():
        figures = json.loads(args.out.read_text())
    for name in args.only or CASES:
        case = CASES[name]
        if name in figures["cases"] or (case.photographs and "SIDECACHE_DATA" not in os.environ):
            continue
        figures["cases"][name] = measure(case)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(*rows_of_table(figures["cases"])))


if __name__ == "__main__":
    main()
