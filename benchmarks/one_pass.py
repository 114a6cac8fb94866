"""Compares many settings in one pass with settings alone: `python -m benchmarks.one_pass pipeline.yaml [...]`.

Every pipeline has a store, as `sidecache extract` makes it. Measured are, for each store and in interleaved rounds,

probe   64 linear probes (4 poolings, 16 weight decays from 1 to 1e-6) in one pass, and each pooling alone at the
        weakest decay; the figure is the time of the pass divided by the mean time of a setting alone.

Reading and pooling the tokens belong to both. Everything runs on --threads threads.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.features.cached import StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.training_job import settings_of
from adapt.training.trials import Trained, TrainingData, train_trials
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.forward.device import configure_process
from store.reader import Store, open_store

POOLINGS = ("cls", "mean", "cls_mean", "backbone")
DECAYS = [10 ** (-6 * step / 15) for step in range(16)]


class Jobs:
    """Searches over the features of a pipeline's store, each from reading them to its best point."""

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store = config, store

    def train(self, method: dict[str, Any]) -> Trained:
        """Train all trials of an entry of `methods:`."""
        (parsed,) = self._config.model_copy(update={"methods": [method], "sweep": {}}).parsed_methods()
        data = TrainingData(PooledFeatures(StreamedFeatures(self._store, torch.device("cpu"))))
        settings, fraction = settings_of(self._config, parsed, 0), self._config.data.val_fraction
        return train_trials(parsed, parsed.trials, data, settings, val_fraction=fraction)


def compare_probes(jobs: Jobs, rounds: int, poolings: Sequence[str]) -> dict[str, Any]:
    """The line `probe`: seconds of the pass and of every setting alone, and their ratio."""
    together = {"name": "linear_probe", "sweep": {"pool": list(poolings), "weight_decay": DECAYS}}
    contestants: dict[str, Callable[[], object]] = {"one pass": lambda: jobs.train(together)}
    for pool in poolings:
        alone = {"name": "linear_probe", "pool": pool, "weight_decay": DECAYS[-1]}
        contestants[pool] = lambda alone=alone: jobs.train(alone)
    seconds = compare(contestants, rounds)
    one_pass, alone = seconds.pop("one pass"), [fmean(each) for each in zip(*seconds.values(), strict=True)]
    return {
        "settings": len(poolings) * len(DECAYS),
        "seconds of the pass": median(one_pass),
        "seconds of a setting alone": {pool: median(taken) for pool, taken in seconds.items()},
        "pass / setting alone": median(all_ / one for all_, one in zip(one_pass, alone, strict=True)),
    }


LINES = {"probe": compare_probes}  # name of a line -> its comparison


def main() -> None:
    """Measure every line on every store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--poolings", nargs="+", default=POOLINGS, choices=POOLINGS)
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {name: {} for name in LINES}
    for path in args.configs:
        config = load_config(path, args.overrides)
        store = open_store(config.store.path)
        for name, line in LINES.items():
            found[name][store.schema.dataset] = line(Jobs(config, store), args.rounds, args.poolings)
    save({**machine(), "threads": args.threads, "rounds": args.rounds, **found}, args.out)


if __name__ == "__main__":
    main()
