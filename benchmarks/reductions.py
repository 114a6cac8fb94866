"""Measures what smaller stores cost in accuracy: `python -m benchmarks.reductions STUDY.yaml --out FILE`.

Of every data set of the study at most 800 training samples go through the backbone once. A quarter of them judges; of
the rest every seed draws its validation rows, as a job does. Test splits are never read. From what each store would
give of the samples three methods are trained: the linear probe of all stored layers (its weight decay chosen on
validation), LoSA and the convolutional ladder (default options and recipe, all stored layers). Figures that FILE has
already are not measured again. Prints the table of docs/storage.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.config.study import Study, load_job
from adapt.features.held import HeldFeatures, HeldLayer, hold
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from benchmarks.ablation import JudgedRows, Variant, run_probe, run_variant
from benchmarks.record import machine
from benchmarks.tables import table
from extract.forward.device import configure_process
from extract.job.extraction_job import ExtractionJob
from store.config import PRESETS, StoreConfig
from store.dtypes import bytes_per_token

STORES: dict[str, StoreConfig] = {
    "full": StoreConfig(layers={"spread": 4}, tokens="all", dtype="float16"),  # type: ignore[arg-type]
    **{
        f"{n} x {n} cells": StoreConfig(layers={"spread": 4}, tokens={"grid": n}, dtype="int8")  # type: ignore[arg-type]
        for n in (8, 2)
    },
    "8 x 8 cells, float16": StoreConfig(layers={"spread": 4}, tokens={"grid": 8}, dtype="float16"),  # type: ignore[arg-type]
    "8 x 8 cells, all layers": StoreConfig(layers="all", tokens={"grid": 8}, dtype="int8"),  # type: ignore[arg-type]
    **{
        f"8 x 8 cells, {n} layers": StoreConfig(layers={"spread": n}, tokens={"grid": 8}, dtype="int8")  # type: ignore[arg-type]
        for n in (6, 2, 1)
    },
    "2 x 2 cells, all layers": StoreConfig(layers="all", tokens={"grid": 2}, dtype="int8"),  # type: ignore[arg-type]
    "pooled, all layers": StoreConfig(**PRESETS["probe"]),
}
FROM_FLOAT = "8 x 8 cells, float16"  # the store of which formats that sidecache does not have are made
GROUP = 32  # channels that share a scale
Round = Callable[[torch.Tensor], torch.Tensor]


def half_bytes(tokens: torch.Tensor) -> torch.Tensor:
    """Levels from -7 to 7 of the values relative to their channel's RMS, a scale for every group of channels."""
    rms = tokens[:32].square().mean(dim=(0, 1)).sqrt().clamp(min=1e-12)
    groups = (tokens / rms).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).clamp(min=1e-12).half().float()
    return (groups / scale).round().clamp(-7, 7).mul(scale).flatten(-2) * rms


def principal(width: int) -> Round:
    """Principal components of the values relative to their channel's RMS, as int8 would keep them."""

    def project(tokens: torch.Tensor) -> torch.Tensor:
        rms = tokens[:32].square().mean(dim=(0, 1)).sqrt().clamp(min=1e-12)
        relative = tokens / rms
        fitted = relative[:256].flatten(0, 1)
        mean = fitted.mean(dim=0)
        _, vectors = torch.linalg.eigh((fitted - mean).T @ (fitted - mean))
        basis = vectors[:, -width:]
        return ((relative - mean) @ basis @ basis.T + mean) * rms

    return project


FORMATS: dict[str, Round] = {
    "8 x 8 cells, half bytes": half_bytes,
    "8 x 8 cells, 96 components": principal(96),
    "8 x 8 cells, 48 components": principal(48),
}


def bytes_a_sample(features: HeldFeatures, name: str) -> float:
    """Bytes of a sample in such a store."""
    tokens, dim = len(features.spec.layers) * features.spec.layout.num_tokens, features.spec.dim
    if name == "8 x 8 cells, half bytes":
        return tokens * (dim / 2 + 2 * dim / GROUP)
    if name.endswith("components"):
        return tokens * bytes_per_token("int8", int(name.split()[-2]))
    return tokens * bytes_per_token(STORES[name].dtype, dim)


def held_stores(job: ExtractionJob, limit: int) -> Iterator[tuple[str, HeldFeatures]]:
    """What each store would give of some training samples."""
    rows = np.sort(np.random.default_rng(0).permutation(len(job.source.splits["train"]))[:limit])
    held = hold(job, rows, STORES, torch.device("cpu"))
    yield from held.items()
    source, everything = held[FROM_FLOAT], np.arange(len(held[FROM_FLOAT].labels("train")))
    for name, round_values in FORMATS.items():
        tokens = {layer: HeldLayer(round_values(stored.decode(everything))) for layer, stored in source.tokens.items()}
        yield name, HeldFeatures(source.spec, tokens, source.labels("train"), num_classes=source.num_classes)


def run_store(features: HeldFeatures, seeds: int, epochs: int) -> dict[str, Any]:
    """Scores of every method that can train from a store, one a seed."""
    data = JudgedRows.of(features, len(features.labels("train")))
    scores = {"linear_probe": run_probe("all", data, seeds=seeds)}
    methods = ["losa"] if features.spec.layout.num_patches < 2 else ["losa", "conv_ladder"]
    variant = Variant(options={"layers": "all"}, refit=True)
    for method in methods:
        scores[method] = run_variant(method, variant, data, epochs=epochs, seeds=seeds)
    return scores


def main() -> None:
    """Run what is missing, save after every store, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=800, help="training samples taken of every set")
    args = parser.parse_args()
    configure_process()
    study = load_job(args.study)
    assert isinstance(study, Study), "a study has `datasets:`"
    settings = {"epochs": args.epochs, "seeds": args.seeds, "limit": args.limit}
    figures: dict[str, Any] = {**machine(), "settings": settings, "bytes_a_sample": {}, "results": {}}
    if args.out.exists():
        figures = json.loads(args.out.read_text())
        if figures["settings"] != settings:
            parser.error(f"{args.out} was made with {figures['settings']}, not {settings}")
    names, results = [*STORES, *FORMATS], figures["results"]
    for part in study.parts:
        found = results.setdefault(part.name.split("/")[0], {})
        if all(name in found for name in names):
            continue
        job = extraction_job(part.config, Inputs(part.config))
        for name, features in held_stores(job, args.limit):
            if name not in found:
                figures["bytes_a_sample"][name] = bytes_a_sample(features, name)
                found[name] = run_store(features, seeds=args.seeds, epochs=args.epochs)
                args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(*rows_of_table(figures)))


def rows_of_table(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Bytes, and by method the mean over the sets; of every other store what it adds to the full one."""
    results = {name: scores for name, scores in figures["results"].items() if len(scores) == len(STORES) + len(FORMATS)}
    kinds = {
        "photographs": [name for name in results if not name.startswith(DRAWN)],
        "structure": [name for name in results if name.startswith(DRAWN)],
    }
    head = ["store", "bytes", *(f"{kind}, {method}" for kind in kinds for method in METHODS)]
    full = figures["bytes_a_sample"]["full"] * 3  # twelve layers, not four
    rows = []
    for store in (*STORES, *FORMATS):
        row = [store, f"1/{full / figures['bytes_a_sample'][store]:.3g}"]
        for sets in kinds.values():
            row += [f"{np.mean([_score(results[name][store], method) for name in sets]):.2f}" for method in METHODS]
        rows.append(row)
    return head, rows


def _score(scores: dict[str, Any], method: str) -> float:
    """The mean over seeds; NaN for a method that cannot train from the store."""
    return float(np.mean(scores[method]["scores"])) if method in scores else float("nan")


METHODS = ("linear_probe", "losa", "conv_ladder")
DRAWN = ("place", "orientation", "count", "distance")

if __name__ == "__main__":
    main()
