"""Measures what augmentation gives to methods on features: `python -m benchmarks.views STUDY.yaml --out FILE`.

Of every data set of the study a store is extracted that has VIEWS augmented views of each training sample beside the
plain one. From some of the views, or from the plain one with mixup or noise on its tokens, LoSA and the convolutional
ladder (default options) are trained from several seeds, and judged on the test split. Nothing is chosen by it. The
samples a second of training with all views and with one are timed in interleaved rounds. Figures that FILE has already
are not measured again. Prints the tables of docs/augmentation.md.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.config.trials import Trial
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.methods.registry import find_method
from adapt.training.evaluation import predict_split
from adapt.training.metrics import evaluate
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.rounds import compare
from benchmarks.studies import jobs_by_dataset, kept_figures, measure_datasets, study_parser
from benchmarks.tables import table
from extract.forward.device import configure_process
from store.config import StoreConfig

VIEWS = 8
# views that an epoch draws from, and settings of the training
VARIANTS: dict[str, tuple[int, dict[str, float]]] = {
    "1 view": (1, {}),
    "2 views": (2, {}),
    "4 views": (4, {}),
    "8 views": (8, {}),
    "mixup 0.2": (1, {"mixup": 0.2}),
    "mixup 0.8": (1, {"mixup": 0.8}),
    "noise 0.1": (1, {"feature_noise": 0.1}),
    "noise 0.3": (1, {"feature_noise": 0.3}),
    "8 views, mixup 0.2": (8, {"mixup": 0.2}),
}
METHODS: dict[str, dict[str, Any]] = {"losa": {"rank": 16}, "conv_ladder": {}}
LR, WEIGHT_DECAY, ROUNDS = 0.003, 0.01, 5
DRAW = RowDraw(val_fraction=0.2, refit=True)  # all training rows, the last epoch


def entries_of(method: str, seeds: int, epochs: int, changes: dict[str, float]) -> list[Entry]:
    """One entry a seed."""
    options = find_method(method).options.model_validate(METHODS[method])
    trial = Trial(options=options, lr=LR, weight_decay=WEIGHT_DECAY)
    settings = Settings(epochs=epochs, batch_size=32, **changes)  # type: ignore[arg-type]
    return [Entry(method=method, trial=trial, seed=seed, settings=settings) for seed in range(seeds)]


def features_of(store: sc.Store, views: int, resident: bool = True) -> ResidentFeatures | StreamedFeatures:
    """The features of a store with some of its views."""
    streamed = StreamedFeatures(store, torch.device("cpu"))
    assert streamed.view_rows is not None
    streamed.view_rows = streamed.view_rows[:, : views - 1] if views > 1 else None
    return ResidentFeatures(streamed, streamed.spec.layers) if resident else streamed


def score_variant(store: sc.Store, method: str, variant: str, *, seeds: int, epochs: int) -> list[float]:
    """The test accuracy of every seed."""
    views, changes = VARIANTS[variant]
    features = features_of(store, views)
    trained = train_entries(entries_of(method, seeds, epochs, changes), TrainingData(PooledFeatures(features)), DRAW)
    labels = features.labels("test")
    return [evaluate(logits, labels).score() for logits in predict_split(trained, features, "test")]


def time_views(store: sc.Store) -> dict[str, list[float]]:
    """Seconds of an epoch of LoSA from all views and from one, by feature source."""

    def epoch(resident: bool, views: int) -> Any:
        features = features_of(store, views, resident)
        data = TrainingData(PooledFeatures(features))
        list(features.batches("augmented", [np.arange(1)], features.spec.layers[:1]))  # load it before the first epoch
        entries = entries_of("losa", 1, 2, {})
        return lambda: train_entries(entries, data, DRAW)

    contestants = {
        f"{'resident' if resident else 'streamed'}, {views}": epoch(resident, views)
        for resident in (True, False)
        for views in (1, VIEWS)
    }
    for run in contestants.values():
        run()  # loads the features
    return compare(contestants, ROUNDS)


def measure_set(config: Config, seeds: int, epochs: int) -> dict[str, Any]:
    """The scores of all variants by method, and the seconds of the epochs."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "run_dir": Path(folder) / "run",
            "store": StoreConfig(preset="lean", path=f"{folder}/cache.zarr"),
            "data": config.data.model_copy(update={"views": VIEWS}),
            "methods": ["losa"],
        }
        store = sc.extract(config.model_copy(update=changes)).store
        scores = {
            method: {name: score_variant(store, method, name, seeds=seeds, epochs=epochs) for name in VARIANTS}
            for method in METHODS
        }
        return {"scores": scores, "seconds": time_views(store)}


def rows_of_table(results: dict[str, Any], method: str) -> tuple[list[str], list[list[str]]]:
    """The test accuracy with one view, and what the variants change of it, in points, by data set and on the mean."""
    plain = {name: np.array(of_set["scores"][method]["1 view"]) for name, of_set in results.items()}
    rows = [["1 view", *(f"{scores.mean():.2f}" for scores in plain.values()), ""]]
    for variant in list(VARIANTS)[1:]:
        # seeds are paired: they have the same initial weights and batches
        gains = np.array([of_set["scores"][method][variant] - plain[name] for name, of_set in results.items()])
        of_set, error = gains.mean(axis=1), gains.mean(axis=1).std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0
        rows.append([variant, *(f"{gain:+.2f}" for gain in of_set), f"{of_set.mean():+.2f} ± {error:.2f}"])
    return [method, *results, "mean ± standard error"], rows


def print_tables(results: dict[str, Any]) -> None:
    """Print the gains of every method and the ratio of the samples a second."""
    for method in METHODS:
        print(table(*rows_of_table(results, method)), end="\n\n")
    for source in ("resident", "streamed"):
        ratios = [
            median(of_set["seconds"][f"{source}, 1"]) / median(of_set["seconds"][f"{source}, {VIEWS}"])
            for of_set in results.values()
        ]
        print(f"samples a second with {VIEWS} views / with one, {source}: {median(ratios):.2f} (median of the sets)")


def main() -> None:
    """Measure what is missing, save after every set, print the tables."""
    parser = study_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    configure_process()
    settings = {"seeds": args.seeds, "epochs": args.epochs}
    figures, jobs = kept_figures(parser, args.out, settings), jobs_by_dataset(args.study)
    print_tables(measure_datasets(jobs, figures, args.out, partial(measure_set, **settings), datasets=args.datasets))


if __name__ == "__main__":
    main()
