"""LoSA's defaults, one factor at a time, on validation data only: `python benchmarks/ablation.py STORE... --out FILE`.

Half of every training split is trained on and half validates, so that the scores are averages over many samples; the
test splits are never read. Every variant trains from the same seeds on the same halves. Writes JSON, and prints the
table of docs/ablation.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.config import MethodConfig, Trial
from adapt.features import Features, ResidentFeatures, StreamedFeatures
from adapt.methods import find_method
from adapt.pooled import PooledFeatures
from adapt.search import Material, train_trials
from adapt.train import Settings
from store.reader import open_store

BASE: dict[str, Any] = {"lr": 0.003, "weight_decay": 0.05}  # else the defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "lr 0.001": {"lr": 0.001},
    "lr 0.01": {"lr": 0.01},
    "weight decay 0.5": {"weight_decay": 0.5},
    "add after_norm": {"add": "after_norm"},
    "norm none": {"norm": "none"},
    "norm backbone": {"norm": "backbone"},
    "pool mean": {"pool": "mean"},
    "pool cls, token rank 0": {"pool": "cls", "token_rank": 0},
    "token rank 0": {"token_rank": 0},
    "token rank 32": {"token_rank": 32},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "layers every 2": {"layers": {"every": 2}},
    "layers last 6": {"layers": {"last": 6}},
    "dropout 0.2": {"dropout": 0.2},
}
PROBES = {
    f"linear probe, {pool}": [{"pool": pool, "weight_decay": 10.0 ** (-power / 2)} for power in range(12)]
    for pool in ("cls", "mean", "cls_mean")
}


class Subset:
    """The first rows of a shuffled training split, as a feature source of their own."""

    def __init__(self, features: Features, limit: int) -> None:
        self._features = features
        self.kind, self.spec, self.device = features.kind, features.spec, features.device
        self.num_classes, self.multi_label = features.num_classes, features.multi_label
        total = len(features.labels("train"))
        self._rows = np.random.default_rng(0).permutation(total)[: min(limit, total)]

    def labels(self, split: str) -> torch.Tensor:
        return self._features.labels(split)[torch.from_numpy(self._rows)]

    def samples_at_once(self, layers: Any) -> int:
        return self._features.samples_at_once(layers)

    def for_epoch(self, seed: int, epoch: int) -> "Subset":
        return self

    def batches(self, split: str, groups: Any, layers: Any, together: int = 1) -> Any:
        batches = self._features.batches(split, [self._rows[group] for group in groups], layers, together)
        return ((group, tokens) for group, (_, tokens) in zip(groups, batches, strict=True))


def run_variant(
    name: str, trials: list[dict[str, Any]], pooled: PooledFeatures, epochs: int, seeds: int
) -> dict[str, Any]:
    """Mean validation score over seeds of the best of some trials."""
    scores, started = [], time.perf_counter()
    for seed in range(seeds):
        parsed = [_trial(name, given) for given in trials]
        method = MethodConfig(name=name, epochs=epochs, batch_size=32, trials=tuple(parsed))
        settings = Settings(epochs, 32, seed)
        trained = train_trials(method, parsed, Material(pooled), settings, val_fraction=0.5)
        scores.append([candidate.score for candidate in trained.candidates])
    best = np.mean(scores, axis=0).argmax()
    column = [row[best] for row in scores]
    return {"score": float(np.mean(column)), "scores": column, "seconds": time.perf_counter() - started}


def _trial(name: str, given: dict[str, Any]) -> Trial:
    options = {key: value for key, value in given.items() if key not in ("lr", "weight_decay")}
    return Trial(
        options=find_method(name).options.model_validate(options),
        lr=given.get("lr"),
        weight_decay=given["weight_decay"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1000, help="training samples taken of every store")
    parser.add_argument("--base", type=json.loads, default=BASE, help="the variant that the others change")
    parser.add_argument("--only", nargs="*", help="variants to run; all by default")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    jobs = [("losa", name, [args.base | change]) for name, change in VARIANTS.items()]
    jobs += [("linear_probe", name, trials) for name, trials in PROBES.items()]
    for path in args.stores:
        store = open_store(path)
        features = Subset(ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), store.layers), args.limit)
        pooled = PooledFeatures(features)
        for method, name, trials in jobs:
            if not args.only or name in args.only:
                outcome = run_variant(method, trials, pooled, args.epochs, args.seeds)
                results.setdefault(name, {})[store.schema.dataset] = outcome
                print(
                    f"{store.schema.dataset:10} {name:20} {outcome['score']:.2f} ({outcome['seconds']:.0f} s)",
                    flush=True,
                )
                args.out.write_text(json.dumps(results, indent=1))
    print_table(results)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    datasets = list(next(iter(results.values())))
    print(f"\n| variant | {' | '.join(datasets)} | mean |\n|---|{'---|' * (len(datasets) + 1)}")
    for name, by_dataset in results.items():
        scores = [by_dataset[dataset]["score"] for dataset in datasets]
        print(f"| {name} | {' | '.join(f'{score:.1f}' for score in scores)} | {np.mean(scores):.1f} |")


if __name__ == "__main__":
    main()
