"""Varies the recipe and the options of side networks: `python -m benchmarks.ablation STORE... --out FILE`.

One thing is varied at a time. A quarter of every training split is set aside and judges; of the rest every seed draws
its own validation rows, as a job does, and trains on the others. Test splits are never read. Every variant is trained
from the same seeds, on the same rows. Figures that FILE has already are not measured again. Prints the tables of
docs/ablation.md.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.config.trials import Trial
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.feature_source import Features
from adapt.features.pooled import PooledFeatures
from adapt.methods.registry import find_method
from adapt.training.batch_order import Rows
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_split
from adapt.training.metrics import evaluate
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.studies import kept_figures
from benchmarks.tables import table
from extract.forward.device import configure_process
from store.reader import open_store

BASES: dict[str, dict[str, Any]] = {
    "losa": {"rank": 16, "token_rank": 32, "layers": {"every": 2}},
    "conv_ladder": {},
}
LR, WEIGHT_DECAY = 0.003, 0.01
PROBE_DECAYS = [10.0 ** (-power / 2) for power in range(12)]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a variant changes of the base of its method.

    Args:
        options: options of the method.
        settings: settings of the training.
        lr: learning rate.
        refit: whether validation rows are trained on too.
    """

    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = LR
    refit: bool = False


RECIPES: dict[str, Variant] = {
    "base": Variant(),
    "keep last": Variant(settings={"keep": "last"}),
    "refit": Variant(refit=True),
    "solve_head 0.1": Variant(settings={"solve_head": 0.1}),
    "solve_head 0.01": Variant(settings={"solve_head": 0.01}),
    "keep last, solve_head 0.01": Variant(settings={"keep": "last", "solve_head": 0.01}),
    "refit, solve_head 0.01": Variant(settings={"solve_head": 0.01}, refit=True),
    "label_smoothing 0.1": Variant(settings={"label_smoothing": 0.1}),
}
LOSA: dict[str, Variant] = {
    "lr 0.01": Variant(lr=0.01),
    "start last": Variant(options={"start": "last"}),
    "add after_norm": Variant(options={"add": "after_norm"}),
    "token_rank 0": Variant(options={"token_rank": 0}),
    "token_rank 8": Variant(options={"token_rank": 8}),
    "rank 64": Variant(options={"rank": 64}),
    "all layers": Variant(options={"layers": "all"}),
    "every third layer": Variant(options={"layers": {"every": 3}}),
    "dropout 0.2": Variant(options={"dropout": 0.2}),
}
VARIANTS = {"losa": RECIPES | LOSA, "conv_ladder": RECIPES}


class Subset:
    """A feature source of some rows of a training split; see `adapt.features.feature_source.Features`."""

    def __init__(self, features: Features, rows: Rows) -> None:
        self._features, self._rows = features, rows
        self.kind, self.spec, self.device = features.kind, features.spec, features.device
        self.num_classes, self.multi_label, self.views = features.num_classes, features.multi_label, features.views

    def labels(self, split: str) -> torch.Tensor:
        """See `Features.labels`."""
        return self._features.labels(split)[torch.from_numpy(self._rows)]

    def samples_at_once(self, layers: Any) -> int:
        """See `Features.samples_at_once`."""
        return self._features.samples_at_once(layers)

    def part_size(self, layers: Any) -> int:
        """See `Features.part_size`."""
        return self._features.part_size(layers)

    def validation_rows(self) -> None:
        """See `Features.validation_rows`; validation is drawn, whether the source has a split for it or not."""
        return

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


@dataclass(frozen=True)
class JudgedRows:
    """What a variant is trained on, and the rows that judge it."""

    trained: PooledFeatures
    judged: Subset

    @classmethod
    def of(cls, features: Features, limit: int) -> "JudgedRows":
        """Draw at most `limit` rows of the training split; a quarter of them judges."""
        rows = np.random.default_rng(0).permutation(len(features.labels("train")))[:limit]
        judged, trained = np.sort(rows[: len(rows) // 4]), np.sort(rows[len(rows) // 4 :])
        return cls(PooledFeatures(Subset(features, trained)), Subset(features, judged))

    def judge(self, candidates: Sequence[Candidate]) -> list[float]:
        """The score of every candidate on the rows that judge."""
        labels = self.judged.labels("train")
        logits = predict_split(candidates, self.judged, "train")
        return [evaluate(of_candidate, labels).score(balance_classes=False) for of_candidate in logits]


def run_variant(method: str, variant: Variant, data: JudgedRows, epochs: int, seeds: int) -> dict[str, Any]:
    """Scores on the rows that judge, one a seed."""
    settings = replace(Settings(epochs=epochs, batch_size=32), **variant.settings)
    trial = _trial(method, BASES[method] | variant.options, lr=variant.lr, weight_decay=WEIGHT_DECAY)
    entries = [Entry(method=method, trial=trial, seed=seed, settings=settings) for seed in range(seeds)]
    started = time.process_time()
    trained = train_entries(entries, TrainingData(data.trained), RowDraw(val_fraction=0.2, refit=variant.refit))
    return {"scores": data.judge(trained), "cpu_seconds": time.process_time() - started}


def run_probe(layers: Any, data: JudgedRows, seeds: int) -> dict[str, Any]:
    """Scores of the linear probe on the rows that judge; validation chooses its weight decay for every seed."""
    settings = Settings(epochs=1, batch_size=32)
    started = time.process_time()
    entries = [
        Entry(
            method="linear_probe",
            trial=_trial("linear_probe", {"layers": layers}, lr=None, weight_decay=decay),
            seed=seed,
            settings=settings,
        )
        for seed in range(seeds)
        for decay in PROBE_DECAYS
    ]
    trained = train_entries(entries, TrainingData(data.trained), RowDraw(val_fraction=0.2))
    of_seed = [trained[start : start + len(PROBE_DECAYS)] for start in range(0, len(trained), len(PROBE_DECAYS))]
    best = [max(candidates, key=lambda candidate: candidate.rank) for candidates in of_seed]
    return {"scores": data.judge(best), "cpu_seconds": time.process_time() - started}


def _trial(method: str, options: dict[str, Any], lr: float | None, weight_decay: float) -> Trial:
    return Trial(options=find_method(method).options.model_validate(options), lr=lr, weight_decay=weight_decay)


def main() -> None:
    """Run what is missing, save after every run, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=800, help="training samples taken of every store")
    args = parser.parse_args()
    configure_process()
    settings = {"bases": BASES, "epochs": args.epochs, "seeds": args.seeds, "limit": args.limit}
    figures = kept_figures(parser, args.out, settings)
    results = figures["results"]
    probes: dict[str, Any] = {"last layer": {"last": 1}, "all layers": "all"}
    jobs = [("linear_probe", name) for name in probes]
    jobs += [(method, name) for method, variants in VARIANTS.items() for name in variants]
    for path in args.stores:
        store = open_store(path)
        data = None
        for method, name in jobs:
            found = results.setdefault(method, {}).setdefault(name, {})
            if store.schema.dataset in found:
                continue
            if data is None:
                features = ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), store.layers)
                data = JudgedRows.of(features, args.limit)
            if method == "linear_probe":
                figure = run_probe(probes[name], data, seeds=args.seeds)
            else:
                variant = VARIANTS[method][name]
                figure = run_variant(method, variant, data, epochs=args.epochs, seeds=args.seeds)
            found[store.schema.dataset] = figure
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print("\n\n".join(tables(results)))


def tables(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table for every method: the base in percent, and what each variant adds to it."""
    return [_table(method, variants) for method, variants in results.items()]


def _table(method: str, variants: dict[str, Any]) -> str:
    """Differences from the first variant: by data set, their mean with its standard error over sets, and CPU time."""
    (base_name, base), *others = variants.items()
    base_means = np.array([np.mean(figure["scores"]) for figure in base.values()])
    cpu = sum(figure["cpu_seconds"] for figure in base.values())
    rows = [[base_name, *(f"{mean:.1f}" for mean in base_means), f"{base_means.mean():.2f}", "1.00"]]
    for name, figures in others:
        gains = np.array([np.mean(figures[dataset]["scores"]) for dataset in base]) - base_means
        error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
        seconds = sum(figures[dataset]["cpu_seconds"] for dataset in base)
        rows.append(
            [name, *(f"{gain:+.1f}" for gain in gains), f"{gains.mean():+.2f} ± {error:.2f}", f"{seconds / cpu:.2f}"]
        )
    return table([method, *base, "mean", "CPU time"], rows)


if __name__ == "__main__":
    main()
