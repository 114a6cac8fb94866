"""Compares many settings in one pass with settings alone: `python -m benchmarks.one_pass pipeline.yaml [...]`.

Every pipeline has a store, as `sidecache extract` makes it. Measured are, for each store and in interleaved rounds,

probe      64 linear probes (4 poolings, 16 weight decays from 1 to 1e-6) in one pass, and each pooling alone at the
           weakest decay; the figure is the time of the pass divided by the mean time of a setting alone.
attentive  20 attentive probes (5 learning rates, 4 weight decays) in one pass, and each of them in a pass of its own.
losa       16 LoSA of equal shape (4 learning rates, 2 weight decays, 2 rates of dropout) in one pass, the same with
           successive halving, and each in a pass of its own. Of halving, also how many points of validation score its
           choice lies behind that of all settings trained to the end, once with every --seeds.

Opening the store, reading and pooling the tokens belong to every contestant. Everything runs on --threads threads.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.config.search_config import HalvingConfig
from adapt.config.trials import MethodConfig, Trial
from adapt.features.cached import StreamedFeatures
from adapt.features.pooled import PooledFeatures
from adapt.job.trial_run import settings_of
from adapt.training.candidate import Candidate
from adapt.training.halving import Rung, rungs
from adapt.training.row_draw import RowDraw
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.record import add_record_options, machine, save
from benchmarks.rounds import compare
from extract.forward.device import configure_process
from store.reader import Store, open_store

POOLINGS = ("cls", "mean", "cls_mean", "backbone")
DECAYS = [10 ** (-6 * step / 15) for step in range(16)]
ATTENTIVE = {
    "name": "attentive_probe",
    "sweep": {"lr": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "weight_decay": [1e-3, 1e-2, 1e-1, 1.0]},
}
LOSA = {
    "name": "losa",
    "rank": 16,
    "sweep": {"lr": [1e-3, 3e-3, 1e-2, 3e-2], "weight_decay": [0.01, 0.1], "dropout": [0.0, 0.2]},
}


class Jobs:
    """Searches over the features of a pipeline's store, each from opening them to the scores of its trials."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self._store = config, store

    def parse(self, method: dict[str, Any]) -> MethodConfig:
        """An entry of `methods:` with its trials."""
        (parsed,) = self.config.model_copy(update={"methods": [method], "sweep": {}}).parsed_methods()
        return parsed

    def train(
        self,
        method: MethodConfig,
        trials: Sequence[Trial],
        drops: Sequence[Rung] = (),
        seed: int = 0,
        on_epoch: Callable[[Entry, Candidate], None] = lambda entry, candidate: None,
    ) -> list[Candidate]:
        """Train trials of a method in one pass."""
        data = TrainingData(PooledFeatures(StreamedFeatures(self._store, torch.device("cpu"))))
        settings, drawn = settings_of(self.config, method), RowDraw.of(self.config, for_search=True)
        entries = [
            Entry(method=method.name, trial=trial, seed=seed, settings=settings, rungs=tuple(drops)) for trial in trials
        ]
        with tempfile.TemporaryDirectory() as folder:  # a pass of a job saves its state too
            return train_entries(entries, data, drawn, Path(folder) / "pass", on_epoch=on_epoch)

    def halving(self, method: MethodConfig) -> list[Rung]:
        """The rungs of `train.halving: {}`."""
        default = HalvingConfig()
        return rungs(method.epochs, default.factor, default.min_epochs)


def compare_probes(jobs: Jobs, args: argparse.Namespace) -> dict[str, Any]:
    """The line `probe`: seconds of the pass and of every setting alone, and their ratio."""
    sweep = {"pool": list(args.poolings), "weight_decay": DECAYS}
    together = jobs.parse({"name": "linear_probe", "sweep": sweep})
    contestants: dict[str, Callable[[], object]] = {"one pass": lambda: jobs.train(together, together.trials)}
    for pool in args.poolings:
        alone = jobs.parse({"name": "linear_probe", "pool": pool, "weight_decay": DECAYS[-1]})
        contestants[pool] = lambda alone=alone: jobs.train(alone, alone.trials)
    seconds = compare(contestants, args.rounds)
    one_pass, alone = seconds.pop("one pass"), [fmean(each) for each in zip(*seconds.values(), strict=True)]
    return {
        "settings": len(together.trials),
        "seconds of the pass": median(one_pass),
        "seconds of a setting alone": {pool: median(taken) for pool, taken in seconds.items()},
        "pass / setting alone": _ratio(one_pass, alone),
    }


def compare_attentive(jobs: Jobs, args: argparse.Namespace) -> dict[str, Any]:
    """The line `attentive`."""
    return _compare_steps(jobs, jobs.parse(ATTENTIVE), args.rounds)


def compare_losa(jobs: Jobs, args: argparse.Namespace) -> dict[str, Any]:
    """The line `losa`."""
    method = jobs.parse(LOSA | {"token_rank": args.token_rank})
    found = _compare_steps(jobs, method, args.rounds, jobs.halving(method))
    behind = {}
    for seed in args.seeds:
        full, halved = (jobs.train(method, method.trials, drops, seed) for drops in ((), jobs.halving(method)))
        chosen = max(range(len(full)), key=lambda k: (halved[k].epochs, halved[k].rank))
        behind[seed] = max(one.score for one in full) - full[chosen].score
    return {**found, "token_rank": args.token_rank, "points behind the choice of all, by seed": behind}


def _compare_steps(jobs: Jobs, method: MethodConfig, rounds: int, drops: Sequence[Rung] = ()) -> dict[str, Any]:
    """Seconds of one pass, of one with halving if there are rungs, and of a pass for each trial."""
    contestants: dict[str, Callable[[], object]] = {
        "one pass": lambda: jobs.train(method, method.trials),
        "runs": lambda: [jobs.train(method, [trial]) for trial in method.trials],
    }
    if drops:
        contestants["halving"] = lambda: jobs.train(method, method.trials, drops)
    seconds = compare(contestants, rounds)
    found: dict[str, Any] = {
        "settings": len(method.trials),
        "epochs": method.epochs,
        "rungs": [[rung.epoch, str(rung.share)] for rung in drops],
        "seconds": {name: median(taken) for name, taken in seconds.items()},
    }
    ratios = {name: _ratio(taken, seconds["runs"]) for name, taken in seconds.items() if name != "runs"}
    return found | {f"{name} / runs": ratio for name, ratio in ratios.items()}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))


LINES = {"probe": compare_probes, "attentive": compare_attentive, "losa": compare_losa}


def main() -> None:
    """Measure the lines on every store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--poolings", nargs="+", default=POOLINGS, choices=POOLINGS)
    parser.add_argument("--token-rank", type=int, default=0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {name: {} for name in args.lines}
    for name, path in itertools.product(args.lines, args.configs):
        config = load_config(path, args.overrides)
        store = open_store(config.store.path)
        found[name][config.name or store.schema.dataset] = LINES[name](Jobs(config, store), args)
        save({**machine(), "threads": args.threads, "rounds": args.rounds, **found}, args.out)


if __name__ == "__main__":
    main()
