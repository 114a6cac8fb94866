"""Measures what smaller stores cost in accuracy: `python -m benchmarks.reductions STUDY.yaml --out FILE`.

Of every data set of the study at most 800 training samples go through the backbone once. A quarter of them judges; of
the rest every seed draws its validation rows, as a job does. Test splits are never read. From what each store would
give of the samples three methods are trained: the linear probe of all stored layers (its weight decay chosen on
validation), LoSA and the convolutional ladder (default options and recipe, all stored layers). Figures that FILE has
already are not measured again. Prints the table of docs/storage.md; --prices writes those that `sidecache plan` quotes.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.features.held import HeldFeatures, HeldLayer, hold
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from benchmarks.ablation import JudgedRows, Variant, run_probe, run_variant
from benchmarks.studies import jobs_by_dataset, kept_figures
from benchmarks.tables import table
from extract.forward.device import configure_process
from extract.job.extraction_job import ExtractionJob
from store.config import StoreConfig
from store.dtypes import bytes_per_token

STORES: dict[str, StoreConfig] = {
    "full": StoreConfig(layers={"spread": 4}, tokens="all", dtype="float16"),  # type: ignore[arg-type]
    **{
        f"{n} x {n} cells": StoreConfig(layers={"spread": 4}, tokens={"grid": n}, dtype="int8")  # type: ignore[arg-type]
        for n in (8, 2)
    },
    "8 x 8 cells, float16": StoreConfig(layers={"spread": 4}, tokens={"grid": 8}, dtype="float16"),  # type: ignore[arg-type]
    "8 x 8 cells, int4": StoreConfig(layers={"spread": 4}, tokens={"grid": 8}, dtype="int4"),  # type: ignore[arg-type]
    "8 x 8 cells, all layers": StoreConfig(layers="all", tokens={"grid": 8}, dtype="int8"),  # type: ignore[arg-type]
    **{
        f"8 x 8 cells, {n} layers": StoreConfig(layers={"spread": n}, tokens={"grid": 8}, dtype="int8")  # type: ignore[arg-type]
        for n in (6, 2, 1)
    },
    "2 x 2 cells, all layers": StoreConfig(layers="all", tokens={"grid": 2}, dtype="int8"),  # type: ignore[arg-type]
    "pooled, all layers": StoreConfig(layers="all", tokens={"grid": 1}, dtype="int8"),  # type: ignore[arg-type]
    "pooled": StoreConfig(layers={"spread": 4}, tokens={"grid": 1}, dtype="int8"),  # type: ignore[arg-type]
}
FROM_FLOAT = "8 x 8 cells, float16"  # the store of which formats that sidecache does not have are made
PRICED = {
    "int8": ("8 x 8 cells", "8 x 8 cells, float16"),
    "int4": ("8 x 8 cells, int4", "8 x 8 cells, float16"),
    "grid": ("8 x 8 cells", "8 x 8 cells, float16"),  # all that side networks read of the full store, in int8
    "coarse": ("8 x 8 cells", "full"),
    "lean": ("2 x 2 cells", "full"),
    "probe": ("pooled, all layers", "full"),
}
KINDS = {
    "what is shown": ("rsscn7", "trashnet", "eurosat"),
    "shape": ("gtsrb20", "signdigits"),
    "structure": ("place", "orientation", "count"),
}
Round = Callable[[torch.Tensor], torch.Tensor]


def principal(width: int) -> Round:
    """Principal components of the values relative to their channel's RMS, as int8 would keep them."""

    def project(tokens: torch.Tensor) -> torch.Tensor:
        rms = tokens[:32].square().mean(dim=(0, 1)).sqrt().clamp(min=1e-12)
        relative = tokens / rms
        fitted = relative[:256].flatten(0, 1)
        mean = fitted.mean(dim=0)
        _, vectors = torch.linalg.eigh((fitted - mean).T @ (fitted - mean))
        basis = vectors[:, -width:]
        projected: torch.Tensor = (relative - mean) @ basis @ basis.T + mean
        return projected * rms

    return project


FORMATS: dict[str, Round] = {
    "8 x 8 cells, 96 components": principal(96),
    "8 x 8 cells, 48 components": principal(48),
}


def bytes_a_sample(features: HeldFeatures, name: str) -> float:
    """Bytes of a sample in such a store."""
    tokens, dim = len(features.spec.layers) * features.spec.layout.num_tokens, features.spec.dim
    if name.endswith("components"):
        return tokens * bytes_per_token("int8", int(name.split()[-2]))
    return tokens * bytes_per_token(STORES[name].dtype, dim)


def held_stores(job: ExtractionJob, limit: int) -> Iterator[tuple[str, HeldFeatures]]:
    """What each store would give of some training samples."""
    rows = np.sort(np.random.default_rng(0).permutation(len(job.source.splits["train"]))[:limit])
    held = hold(job, rows, STORES, device=torch.device("cpu"))
    yield from held.items()
    source, everything = held[FROM_FLOAT], np.arange(len(held[FROM_FLOAT].labels("train")))
    for name, round_values in FORMATS.items():
        tokens = {layer: HeldLayer(round_values(stored.decode(everything))) for layer, stored in source.tokens.items()}
        yield name, HeldFeatures(source.spec, tokens, source.held_labels)


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
    parser.add_argument("--only", nargs="+", choices=[*STORES, *FORMATS], help="stores; all by default")
    parser.add_argument("--prices", type=Path, help="adapt/planning/preset_prices.json")
    args = parser.parse_args()
    configure_process()
    settings = {"epochs": args.epochs, "seeds": args.seeds, "limit": args.limit}
    figures = kept_figures(parser, args.out, settings)
    names, results = args.only or [*STORES, *FORMATS], figures["results"]
    for dataset, config in jobs_by_dataset(args.study).items():
        found = results.setdefault(dataset, {})
        if all(name in found for name in names):
            continue
        job = extraction_job(config, Inputs(config))
        for name, features in held_stores(job, args.limit):
            if name in names and name not in found:
                figures.setdefault("bytes_a_sample", {})[name] = bytes_a_sample(features, name)
                found[name] = run_store(features, seeds=args.seeds, epochs=args.epochs)
                args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(*rows_of_table(figures)))
    if args.prices:
        args.prices.write_text(json.dumps(prices_of_presets(figures), indent=1) + "\n")


def price(figures: dict[str, Any], store: str, sets: Sequence[str], reference: str = "full") -> dict[str, float]:
    """Points by which the best method from a store is behind that from another; the error is over sets and seeds."""
    results = figures["results"]
    lost = np.array([_best(results[k], reference) - _best(results[k], store) for k in measured(results, store, sets)])
    error = float(lost.std(ddof=1) / np.sqrt(lost.size))
    return {"points": round(float(lost.mean()), 2), "error": round(error, 2)}


def measured(results: dict[str, Any], store: str, sets: Sequence[str]) -> list[str]:
    """Those of some data sets on which a store was measured."""
    return [name for name in sets if store in results.get(name, {})]


def _best(of_set: dict[str, Any], store: str) -> np.ndarray:
    """Scores of the best method, by seed; the full store holds what is pooled of all layers too."""
    scores = list(of_set[store].values()) + (list(of_set["pooled, all layers"].values()) if store == "full" else [])
    best: np.ndarray = max((np.array(one["scores"]) for one in scores), key=lambda of_seeds: float(of_seeds.mean()))
    return best


def prices_of_presets(figures: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What `sidecache plan` quotes: presets against the full store, int8 against float16."""
    found = {}
    for name, (store, reference) in PRICED.items():
        found[name] = {kind: price(figures, store, sets, reference) for kind, sets in KINDS.items()}
    return found


def rows_of_table(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Bytes; by kind of task the accuracy of the full store's best method, and what those of the others add to it."""
    head, results = ["store", "bytes", "sets", *KINDS], figures["results"]
    full = figures["bytes_a_sample"]["full"] * 3  # of twelve layers, not of the four that side networks read
    rows = []
    for store in (*STORES, *FORMATS):
        n_sets = sum(len(measured(results, store, sets)) for sets in KINDS.values())
        row = [store, f"1/{full / figures['bytes_a_sample'][store]:.3g}", str(n_sets)]
        for sets in KINDS.values():
            if store == "full":
                row.append(f"{np.mean([_best(results[k], store).mean() for k in measured(results, store, sets)]):.2f}")
            else:
                lost = price(figures, store, sets)
                row.append(f"{-lost['points']:+.2f} ± {lost['error']:.2f}")
        rows.append(row)
    return head, rows


if __name__ == "__main__":
    main()
