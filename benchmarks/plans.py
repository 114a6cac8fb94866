"""Compares what `sidecache plan` says with what then happens: `python -m benchmarks.plans --out FILE`.

Every case is a job of the embedded ViT on handwritten digits, or of a ViT-Tiny on aerial scenes (rsscn7, where
$SIDECACHE_DATA is set), with other methods, epochs, seeds or points. It is planned; then it is run from every feature
source that the plan says is possible, each time in a new folder: extraction, training and report. A plan is right if no
other source took less time than the one that it calls the fastest, or at most a twentieth less. Printed are bytes and
seconds of extraction, of training and of the whole, predicted divided by actual. Figures that FILE has are kept.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.planning.planner import make_plan
from benchmarks.record import machine
from benchmarks.tables import table
from extract.forward.device import configure_process

_LOSA = {"name": "losa", "rank": 16}
_RATES = {"lr": [0.001, 0.003, 0.01, 0.03]}
# base, and the sections that differ
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits, probe": ("digits", {"methods": ["linear_probe"]}),
    "digits, probe of all layers, 12 decays": (
        "digits",
        {
            "methods": [
                {"name": "linear_probe", "layers": "all", "sweep": {"weight_decay": [10.0**-k for k in range(12)]}}
            ]
        },
    ),
    "digits, losa, 1 epoch": ("digits", {"methods": [_LOSA], "train": {"epochs": 1}}),
    "digits, losa, 4 epochs": ("digits", {"methods": [_LOSA], "train": {"epochs": 4}}),
    "digits, losa, 8 epochs, 3 seeds": ("digits", {"methods": [_LOSA], "train": {"epochs": 8, "seeds": [0, 1, 2]}}),
    "digits, losa, 4 rates": ("digits", {"methods": [_LOSA | {"sweep": _RATES}], "train": {"epochs": 4}}),
    "digits, losa, 4 rates, halving": (
        "digits",
        {"methods": [_LOSA | {"sweep": _RATES}], "train": {"epochs": 6, "halving": {}}},
    ),
    "digits, five methods": (
        "digits",
        {"methods": [_LOSA, "ladder", "conv_ladder", "attentive_probe", "last"], "train": {"epochs": 3}},
    ),
    "digits, losa, int8, pooled": (
        "digits",
        {"methods": [_LOSA], "train": {"epochs": 6}, "store": {"dtype": "int8", "tokens": {"pool": 2}}},
    ),
    "digits, efficient probe, refit": (
        "digits",
        {"methods": ["efficient_probe"], "train": {"epochs": 6, "refit": True}},
    ),
    "rsscn7, probe": ("rsscn7", {"methods": ["linear_probe"]}),
    "rsscn7, losa, 1 epoch": ("rsscn7", {"methods": [_LOSA], "train": {"epochs": 1}}),
    "rsscn7, losa, 3 epochs": ("rsscn7", {"methods": [_LOSA], "train": {"epochs": 3}}),
    "rsscn7, lean, 4 rates": (
        "rsscn7",
        {"methods": [_LOSA | {"sweep": _RATES}], "train": {"epochs": 3}, "store": {"preset": "lean"}},
    ),
}


def document(base: str, sections: dict[str, Any], folder: str) -> dict[str, Any]:
    """The configuration of a case in a folder."""
    job: dict[str, Any] = {
        "run_dir": f"{folder}/run",
        "store": {"path": f"{folder}/cache.zarr"},
        "train": {"batch_size": 32, "seeds": [0], "refit": False},
        "data": {"source": "digits"},
        "backbone": {"weights": "extract/fractal_vit"},
    }
    if base == "rsscn7":
        data = os.environ["SIDECACHE_DATA"]
        weights = f"{data}/weights/vit_tiny_patch16_224_imagenet1k.safetensors"
        job["data"] = {"source": "folder", "root": f"{data}/images/rsscn7"}
        job["backbone"] = {"name": "vit_tiny_patch16_224", "weights": weights}
    for name, section in sections.items():
        job[name] = job[name] | section if isinstance(section, dict) else section
    return job


def run_from(base: str, sections: dict[str, Any], source: str) -> dict[str, float]:
    """Seconds of extraction and of the whole, and bytes of the store, of a job from a feature source."""
    with tempfile.TemporaryDirectory() as folder:
        sections = sections | {"train": sections.get("train", {}) | {"feature_source": source}}
        config = load_config(document(base, sections, folder))
        started, found = time.perf_counter(), dict[str, float]()
        if source != "online":
            extraction = sc.extract(config)
            found = {"extract": extraction.seconds, "bytes": float(extraction.store.n_bytes())}
            sc.train(config)
        else:
            sc.run(config)
        return found | {"total": time.perf_counter() - started}


def measure(base: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The plan of a case, and what happened."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(load_config(document(base, sections, folder)))
    actual = {source: run_from(base, sections, source) for source in plan.total_seconds}
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
        base, sections = CASES[name]
        if name in figures["cases"] or (base == "rsscn7" and "SIDECACHE_DATA" not in os.environ):
            continue
        figures["cases"][name] = measure(base, sections)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(*rows_of_table(figures["cases"])))


if __name__ == "__main__":
    main()
