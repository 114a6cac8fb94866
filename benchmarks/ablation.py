"""Varies LoSA's defaults one at a time: `python -m benchmarks.ablation STORE... --out FILE`.

One half of every training split is trained on and the other validates, so that scores are averages over many samples;
test splits are never read. Every variant is trained from the same seeds on the same halves. Figures that FILE has
already are not measured again. Prints the table of docs/ablation.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.config.trials import MethodConfig, Trial
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.feature_source import Features
from adapt.features.pooled import PooledFeatures
from adapt.methods.registry import find_method
from adapt.training.loop import Settings
from adapt.training.trials import TrainingData, train_trials
from benchmarks.record import machine
from benchmarks.tables import table
from extract.forward.device import configure_process
from store.reader import open_store

BASE: dict[str, Any] = {"lr": 0.003, "weight_decay": 0.05}  # all other options at their defaults
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
    "rank 16": {"rank": 16},
    "layers every 2": {"layers": {"every": 2}},
    "layers last 6": {"layers": {"last": 6}},
    "dropout 0.2": {"dropout": 0.2},
}
PROBES = {
    f"linear probe, {pool}": [{"pool": pool, "weight_decay": 10.0 ** (-power / 2)} for power in range(12)]
    for pool in ("cls", "mean", "cls_mean")
}


class Subset:
    """A feature source of some random rows of a training split; see `adapt.features.feature_source.Features`."""

    def __init__(self, features: Features, limit: int) -> None:
        self._features = features
        self.kind, self.spec, self.device = features.kind, features.spec, features.device
        self.num_classes, self.multi_label, self.views = features.num_classes, features.multi_label, features.views
        total = len(features.labels("train"))
        self._rows = np.random.default_rng(0).permutation(total)[: min(limit, total)]

    def labels(self, split: str) -> torch.Tensor:
        """See `Features.labels`."""
        return self._features.labels(split)[torch.from_numpy(self._rows)]

    def samples_at_once(self, layers: Any) -> int:
        """See `Features.samples_at_once`."""
        return self._features.samples_at_once(layers)

    def for_epoch(self, seed: int, epoch: int) -> "Subset":
        """See `Features.for_epoch`."""
        return self

    def rounding(self, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        """See `Features.rounding`."""
        return self._features.rounding(layer, tokens)

    def batches(self, split: str, groups: Any, layers: Any, together: int = 1) -> Any:
        """See `Features.batches`."""
        batches = self._features.batches(split, [self._rows[group] for group in groups], layers, together)
        return ((group, tokens) for group, (_, tokens) in zip(groups, batches, strict=True))


def run_variant(
    name: str, trials: list[dict[str, Any]], pooled: PooledFeatures, epochs: int, seeds: int
) -> dict[str, Any]:
    """Mean validation score over seeds, of the trial that is best in the mean."""
    scores = []
    for seed in range(seeds):
        parsed = [_trial(name, trial) for trial in trials]
        method = MethodConfig(name=name, epochs=epochs, batch_size=32, trials=tuple(parsed))
        settings = Settings(epochs, 32, seed)
        trained = train_trials(method, parsed, TrainingData(pooled), settings, val_fraction=0.5)
        scores.append([candidate.score for candidate in trained.candidates])
    best = np.mean(scores, axis=0).argmax()
    scores_of_best = [of_seed[best] for of_seed in scores]
    return {"score": float(np.mean(scores_of_best)), "scores": scores_of_best}


def _trial(name: str, values: dict[str, Any]) -> Trial:
    options = {key: value for key, value in values.items() if key not in ("lr", "weight_decay")}
    return Trial(
        options=find_method(name).options.model_validate(options),
        lr=values.get("lr"),
        weight_decay=values["weight_decay"],
    )


def main() -> None:
    """Run what is missing, save after every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=500, help="training samples taken of every store")
    args = parser.parse_args()
    configure_process()
    settings = {"base": BASE, "epochs": args.epochs, "seeds": args.seeds, "limit": args.limit}
    figures = {**machine(), "settings": settings, "results": {}}
    if args.out.exists():
        figures = json.loads(args.out.read_text())
        if figures["settings"] != settings:
            parser.error(f"{args.out} was made with {figures['settings']}, not {settings}")
    results = figures["results"]
    jobs = [("losa", name, [BASE | change]) for name, change in VARIANTS.items()]
    jobs += [("linear_probe", name, trials) for name, trials in PROBES.items()]
    for path in args.stores:
        store = open_store(path)
        features = Subset(ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), store.layers), args.limit)
        pooled = PooledFeatures(features)
        for method, name, trials in jobs:
            found = results.setdefault(name, {})
            if store.schema.dataset not in found:
                figure = run_variant(method, trials, pooled, epochs=args.epochs, seeds=args.seeds)
                found[store.schema.dataset] = figure
                args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(results)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print scores in percent, by variant and data set."""
    datasets = list(results["base"])
    scores = {name: [found[dataset]["score"] for dataset in datasets] for name, found in results.items()}
    rows = ([name, *(f"{score:.1f}" for score in [*row, np.mean(row)])] for name, row in scores.items())
    print(table(["variant", *datasets, "mean"], rows))


if __name__ == "__main__":
    main()
