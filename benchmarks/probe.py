"""The linear probe beside scikit-learn: `python benchmarks/probe.py pipeline.yaml [-o section.key=value]`.

Both read the same pooled features of the store, standardised by the training rows; both are chosen on the same
validation rows: ours over the grid of the pipeline's `linear_probe`, scikit-learn's LogisticRegression over C and the
pooling. Prints test accuracy by seed and the means, and the seconds that each search took.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from adapt.config import load_config
from adapt.features import ResidentFeatures, StreamedFeatures
from adapt.run import settings_of
from adapt.search import train_trials
from adapt.split import draw_validation
from adapt.train import evaluate_split
from store.reader import open_store

STRENGTHS = 10.0 ** np.arange(-4, 4)


def fit_sklearn(pooled: dict[str, Any], rows: np.ndarray, val_rows: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """(validation score, pooling, C, fitted model, mean, std) of the best over pooling and C."""
    best: tuple[Any, ...] = (-1.0,)
    for mode, features in pooled.items():
        x = features.numpy()
        mean, std = x[rows].mean(axis=0), np.maximum(x[rows].std(axis=0), 1e-6)
        x = (x - mean) / std
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=3000).fit(x[rows], labels[rows])
            score = 100 * model.score(x[val_rows], labels[val_rows])
            if score > best[0]:
                best = (score, mode, strength, model, mean, std)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    method = next(method for method in config.parsed_methods() if method.name == "linear_probe")
    store = open_store(config.store.path)
    features = ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), store.layers[-1:])
    labels, fraction = store.labels("train"), config.data.val_fraction
    rows_out = []
    for seed in config.train.seeds:
        started = time.perf_counter()
        trained = train_trials(method, method.trials, features, settings_of(config, method, seed), fraction)
        best = max(trained.candidates, key=lambda candidate: candidate.rank)
        ours, middle = evaluate_split(best.model, trained.inputs, "test").top1, time.perf_counter()
        rows, val_rows = draw_validation(features.labels("train"), fraction, seed)
        _, mode, strength, model, mean, std = fit_sklearn(trained.inputs.whole("train"), rows, val_rows, labels)
        ended = time.perf_counter()
        test = (trained.inputs.whole("test")[mode].numpy() - mean) / std
        theirs = 100 * model.score(test, store.labels("test"))
        rows_out.append({"seed": seed, "probe": ours, "sklearn": theirs, "C": strength, "pool": mode})
        rows_out[-1] |= {"probe_seconds": middle - started, "sklearn_seconds": ended - middle}
        print(
            f"seed {seed}: probe {ours:.2f} ({middle - started:.0f} s, lr {best.lr:g}, wd {best.weight_decay:g}, "
            f"{best.model.readout.mode}), scikit-learn {theirs:.2f} ({ended - middle:.0f} s, C {strength:g}, {mode})"
        )
    means = {name: float(np.mean([row[name] for row in rows_out])) for name in ("probe", "sklearn")}
    print(
        f"mean: probe {means['probe']:.2f}, scikit-learn {means['sklearn']:.2f}, "
        f"difference {means['probe'] - means['sklearn']:+.2f} points"
    )
    if args.out:
        args.out.write_text(json.dumps({"dataset": store.schema.dataset, "rows": rows_out, "means": means}, indent=1))


if __name__ == "__main__":
    main()
