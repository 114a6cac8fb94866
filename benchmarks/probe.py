"""Compares the linear probe with scikit-learn: `python -m benchmarks.probe pipeline.yaml [-o section.key=value]`.

Both search the grid of the pipeline's `linear_probe` on the same pooled features, standardized by the training rows,
and choose on the same validation rows. scikit-learn's LogisticRegression has the C of each weight decay; it runs with
its default tolerance, and with one that brings it near the optimum, which the probe reaches. The searches of a seed run
in interleaved rounds; the seconds are medians. Everything runs on one thread: in matrix products as small as these,
OpenBLAS threads spend most of the time waiting for each other.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.trial_run import settings_of
from adapt.methods.readout import Readout
from adapt.training.evaluation import predict_split
from adapt.training.linear_solver import readout_of
from adapt.training.metrics import evaluate
from adapt.training.row_draw import RowDraw, draw_rows
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.forward.device import configure_process
from store.reader import Store, open_store

TOLERANCES = {"scikit-learn": 1e-4, "scikit-learn, tol=1e-6": 1e-6}  # the first one is the default


@dataclass(frozen=True)
class Choice:
    """The point of the grid with the best validation score."""

    pool: str
    weight_decay: float
    test_accuracy: Callable[[], float]


class Searches:
    """Searches of the grid of a pipeline's linear probe, on the pooled features of a store."""

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store, self._row_draw = config, store, RowDraw.of(config)
        self._method = next(method for method in config.parsed_methods() if method.name == "linear_probe")
        layer = store.layers[-1]
        self._pooled = PooledFeatures(ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), [layer]))
        self._data = TrainingData(self._pooled)
        readouts: dict[str, Readout] = {
            trial.options.pool: self._data.new_model(self._method.name, trial, 0).readout
            for trial in self._method.trials
        }
        for split in ("train", "test"):
            self._pooled.require(split, list(readouts.values()))
        self._train, self._test = (
            {mode: self._pooled.whole(split, readout).numpy() for mode, readout in readouts.items()}
            for split in ("train", "test")
        )

    def by_probe(self, seed: int) -> Choice:
        """Search as `sidecache train` does."""
        name, settings, features = self._method.name, settings_of(self._config, self._method), self._pooled.features
        entries = [Entry(method=name, trial=trial, seed=seed, settings=settings) for trial in self._method.trials]
        best = max(train_entries(entries, self._data, self._row_draw), key=lambda candidate: candidate.rank)

        def accuracy() -> float:
            (logits,) = predict_split([best], features, "test")
            return evaluate(logits, features.labels("test")[:: features.views]).top1

        return Choice(readout_of(best).mode, best.weight_decay, accuracy)

    def by_sklearn(self, seed: int, tolerance: float) -> Choice:
        """Search with models of scikit-learn."""
        labels, features = self._store.labels("train"), self._pooled.features
        own = features.validation_rows()
        rows, val_rows = draw_rows(features.labels("train"), self._row_draw, seed=seed, validation_rows=own)
        best: tuple[tuple[float, float], Choice] | None = None
        for mode, x in self._train.items():
            mean, std = x[rows].mean(axis=0), np.maximum(x[rows].std(axis=0), 1e-6)
            x, x_test = (x - mean) / std, (self._test[mode] - mean) / std
            for decay in sorted({trial.weight_decay for trial in self._method.trials}):
                model = LogisticRegression(C=1 / (len(rows) * decay), tol=tolerance, max_iter=5000)
                model.fit(x[rows], labels[rows])
                loss = log_loss(labels[val_rows], model.predict_proba(x[val_rows]), labels=model.classes_)
                rank = float(model.score(x[val_rows], labels[val_rows])), -float(loss)
                if best is None or rank > best[0]:
                    best = rank, Choice(mode, decay, lambda model=model, x_test=x_test: self._score(model, x_test))
        assert best is not None
        return best[1]

    def _score(self, model: LogisticRegression, x: np.ndarray) -> float:
        return 100 * float(model.score(x, self._store.labels("test")))


def compare_searches(searches: Searches, seed: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Run all searches of one seed; for each: its choice, the test accuracy of that, and its median seconds."""
    jobs: dict[str, Callable[[], Choice]] = {"linear_probe": lambda: searches.by_probe(seed)}
    for name, tolerance in TOLERANCES.items():
        jobs[name] = lambda tolerance=tolerance: searches.by_sklearn(seed, tolerance)
    choices: dict[str, Choice] = {}
    contestants = {name: lambda name=name, job=job: choices.update({name: job()}) for name, job in jobs.items()}
    seconds = compare(contestants, rounds)
    return {
        name: {
            "accuracy": choice.test_accuracy(),
            "seconds": median(seconds[name]),
            "speed": median(ours / own for ours, own in zip(seconds["linear_probe"], seconds[name], strict=True)),
            "pool": choice.pool,
            "weight_decay": choice.weight_decay,
        }
        for name, choice in choices.items()
    }


def main() -> None:
    """Compare the searches for every seed of the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    parser.add_argument("--rounds", type=int, default=5)
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    torch.set_num_threads(1)
    config = load_config(args.config, args.overrides)
    store = open_store(config.store.path)
    searches = Searches(config, store)
    with threadpool_limits(1):
        rows = {seed: compare_searches(searches, seed, args.rounds) for seed in config.train.seeds}
    means = {
        name: {key: fmean(row[name][key] for row in rows.values()) for key in ("accuracy", "seconds", "speed")}
        for name in ("linear_probe", *TOLERANCES)
    }
    save({**machine(), "dataset": store.schema.dataset, "seeds": rows, "means": means}, args.out)


if __name__ == "__main__":
    main()
