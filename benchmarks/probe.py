"""The linear probe beside scikit-learn: `python -m benchmarks.probe pipeline.yaml [-o section.key=value]`.

Both read the same pooled features of the store, standardised by the training rows; both are chosen on the same
validation rows over the grid of the pipeline's `linear_probe`: scikit-learn's LogisticRegression with the C that stands
for each weight decay. Test accuracy by seed and the means, what was chosen, and the seconds that each search took, on
one thread: of several, OpenBLAS's wait for each other in products as small as these, and take many times as long.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

from adapt.candidate import Candidate
from adapt.config import load_config
from adapt.features import ResidentFeatures, StreamedFeatures
from adapt.pooled import PooledFeatures
from adapt.run import settings_of
from adapt.search import Material, train_trials
from adapt.solve import readout_of
from adapt.split import draw_validation
from adapt.train import evaluate_split
from benchmarks.record import add_record_options, machine, save
from store.reader import open_store


def fit_sklearn(
    pooled: dict[str, np.ndarray], decays: list[float], rows: np.ndarray, val_rows: np.ndarray, labels: np.ndarray
) -> tuple[Any, ...]:
    """((validation score, minus the loss), pooling, weight decay, model, mean, std): the best over the same grid."""
    best: tuple[Any, ...] = ((-1.0, 0.0),)
    for mode, x in pooled.items():
        mean, std = x[rows].mean(axis=0), np.maximum(x[rows].std(axis=0), 1e-6)
        x = (x - mean) / std
        for decay in decays:
            model = LogisticRegression(C=1 / (len(rows) * decay), max_iter=3000).fit(x[rows], labels[rows])
            loss = log_loss(labels[val_rows], model.predict_proba(x[val_rows]), labels=model.classes_)
            rank = 100 * model.score(x[val_rows], labels[val_rows]), -loss
            if rank > best[0]:
                best = (rank, mode, decay, model, mean, std)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    add_record_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(args.config, args.overrides)
    method = next(method for method in config.parsed_methods() if method.name == "linear_probe")
    store = open_store(config.store.path)
    pooled = PooledFeatures(ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), store.layers[-1:]))
    labels, fraction, layer = store.labels("train"), config.data.val_fraction, store.layers[-1]
    decays = sorted({trial.weight_decay for trial in method.trials})
    readouts = {
        trial.options.pool: readout_of(Candidate(Material(pooled).new_model(method.name, trial, 0), None, 0.0))
        for trial in method.trials
    }
    for split in ("train", "test"):
        pooled.require(split, layer, list(readouts.values()))
    train, test = (
        {mode: pooled.whole(split, layer, readout).numpy() for mode, readout in readouts.items()}
        for split in ("train", "test")
    )
    rows_out = []
    for seed in config.train.seeds:
        started = time.perf_counter()
        trained = train_trials(method, method.trials, Material(pooled), settings_of(config, method, seed), fraction)
        best, middle = max(trained.candidates, key=lambda candidate: candidate.rank), time.perf_counter()
        ours = evaluate_split(best.model, pooled.features, "test").top1
        rows, val_rows = draw_validation(pooled.features.labels("train"), fraction, seed)
        before = time.perf_counter()
        with threadpool_limits(1):
            _, mode, decay, model, mean, std = fit_sklearn(train, decays, rows, val_rows, labels)
        theirs_seconds = time.perf_counter() - before
        theirs = 100 * model.score((test[mode] - mean) / std, store.labels("test"))
        probe = {"accuracy": ours, "seconds": middle - started, "pool": readout_of(best).mode}
        sklearn = {"accuracy": theirs, "seconds": theirs_seconds, "pool": mode}
        chosen = {"seed": seed, "probe": probe | {"weight_decay": best.weight_decay}}
        rows_out.append(chosen | {"sklearn": sklearn | {"weight_decay": decay}})
    means = {name: float(np.mean([row[name]["accuracy"] for row in rows_out])) for name in ("probe", "sklearn")}
    save({**machine(), "dataset": store.schema.dataset, "rows": rows_out, "means": means}, args.out)


if __name__ == "__main__":
    main()
