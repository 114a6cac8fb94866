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
from adapt.job.training_job import settings_of
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import readout_of
from adapt.training.loop import evaluate_split
from adapt.training.row_draw import draw_validation
from adapt.training.trials import TrainingData, train_trials
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
        self._config, self._store = config, store
        self._method = next(method for method in config.parsed_methods() if method.name == "linear_probe")
        layer = store.layers[-1]
        self._pooled = PooledFeatures(ResidentFeatures(StreamedFeatures(store, torch.device("cpu")), [layer]))
        readouts = {
            trial.options.pool: readout_of(
                Candidate(TrainingData(self._pooled).new_model(self._method.name, trial, 0), None, 0.0)
            )
            for trial in self._method.trials
        }
        for split in ("train", "test"):
            self._pooled.require(split, layer, list(readouts.values()))
        self._train, self._test = (
            {mode: self._pooled.whole(split, layer, readout).numpy() for mode, readout in readouts.items()}
            for split in ("train", "test")
        )

    def by_probe(self, seed: int) -> Choice:
        """Search as `sidecache train` does."""
        settings, fraction = settings_of(self._config, self._method, seed), self._config.data.val_fraction
        data = TrainingData(self._pooled)
        best = train_trials(self._method, self._method.trials, data, settings, val_fraction=fraction).best

        def accuracy() -> float:
            return evaluate_split(best.model, self._pooled.features, "test").top1

        return Choice(readout_of(best).mode, best.weight_decay, accuracy)

    def by_sklearn(self, seed: int, tolerance: float) -> Choice:
        """Search with models of scikit-learn."""
        labels, fraction = self._store.labels("train"), self._config.data.val_fraction
        rows, val_rows = draw_validation(self._pooled.features.labels("train"), fraction, seed)
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
