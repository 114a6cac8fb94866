"""Simulates successive halving on full trainings: `python -m benchmarks.halving pipeline.yaml [...]`.

Every pipeline has a store, as `sidecache extract` makes it. The 16 LoSA settings of benchmarks.one_pass are trained to
the end on it, once with every --seeds, and validated after each epoch. A candidate that is dropped does not change the
others, so that the choice of any rungs can be read from these records. For each rule are given

share      epochs that it trains, of those of the full search
behind     points of validation score that its choice lies behind that of the full search: mean and maximum
equal      the share of searches in which it is not behind

`by` says by what candidates are compared at a rung: `best score`, of all epochs so far, then the loss; `last score`, of
the last epoch, then the loss; `last loss`; `mean score`, of the last two epochs.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from adapt.config.load_config import load_config
from adapt.training.candidate import Candidate
from adapt.training.halving import Rung, rungs
from adapt.training.trials import Entry
from benchmarks.one_pass import LOSA, Jobs
from benchmarks.record import add_record_options, machine, save
from extract.forward.device import configure_process
from store.reader import open_store


class Epoch(NamedTuple):
    """Validation score and loss after an epoch."""

    score: float
    loss: float


Curve = list[Epoch]
Compare = Callable[[Curve], tuple[float, ...]]

COMPARISONS: dict[str, Compare] = {
    "best score": lambda curve: max((epoch.score, -epoch.loss) for epoch in curve),
    "last score": lambda curve: (curve[-1].score, -curve[-1].loss),
    "last loss": lambda curve: (-curve[-1].loss,),
    "mean score": lambda curve: (fmean(epoch.score for epoch in curve[-2:]), -curve[-1].loss),
}


def train_curves(jobs: Jobs, token_rank: int, seed: int) -> list[Curve]:
    """The validation of every setting after every epoch."""
    method = jobs.parse(LOSA | {"token_rank": token_rank})
    curves: dict[str, Curve] = {str(trial): [] for trial in method.trials}

    def note(entry: Entry, candidate: Candidate) -> None:
        curves[str(entry.trial)].append(Epoch(candidate.val_score, candidate.val_loss))

    jobs.train(method, method.trials, seed=seed, on_epoch=note)
    return [curves[str(trial)] for trial in method.trials]


def simulate(curves: Sequence[Curve], drops: Sequence[Rung], compare: Compare) -> tuple[float, float]:
    """The share of all epochs that is trained, and the points that the choice is behind the best of all."""
    best = COMPARISONS["best score"]
    left, epoch, trained = list(curves), 0, 0
    for rung in drops:
        trained += (rung.epoch - epoch) * len(left)
        epoch = rung.epoch
        n_kept = -(-rung.share.numerator * len(left) // rung.share.denominator)
        left = sorted(left, key=lambda curve: compare(curve[: rung.epoch]), reverse=True)[:n_kept]
    trained += (len(curves[0]) - epoch) * len(left)
    behind = max(map(best, curves))[0] - max(map(best, left))[0]
    return trained / sum(map(len, curves)), behind


def rules(epochs: int) -> dict[str, list[Rung]]:
    """Rungs of several factors and first rungs."""
    found = {}
    for factor, first in itertools.product((2, 3, 4), (1, 2, 3)):
        drops = rungs(epochs, factor=factor, min_epochs=first)
        assert all(rung.share == Fraction(1, factor) for rung in drops)
        found[f"factor {factor}, first rung after {first}"] = drops
    return found


def main() -> None:
    """Train, simulate, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("-o", action="append", default=[], dest="overrides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--token-rank", type=int, default=0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add_record_options(parser)
    args = parser.parse_args()
    configure_process()
    torch.set_num_threads(args.threads)
    curves: dict[str, list[Curve]] = {}
    for path, seed in itertools.product(args.configs, args.seeds):
        config = load_config(path, args.overrides)
        jobs = Jobs(config, open_store(config.store.path))
        curves[f"{config.report_as.dataset or config.name} seed {seed}"] = train_curves(jobs, args.token_rank, seed)
        save({**machine(), "rules": table(list(curves.values())), "curves": curves}, args.out)


def table(curves: Sequence[Sequence[Curve]]) -> list[dict[str, Any]]:
    """The figures of every rule, over all searches."""
    found = []
    for (name, drops), by in itertools.product(rules(len(curves[0][0])).items(), COMPARISONS):
        shares, behind = zip(*(simulate(search, drops, COMPARISONS[by]) for search in curves), strict=True)
        found.append(
            {
                "rungs": name,
                "by": by,
                "share": round(fmean(shares), 3),
                "behind": [round(fmean(behind), 2), round(max(behind), 2)],
                "equal": round(sum(points <= 0 for points in behind) / len(behind), 2),
            }
        )
    return found


if __name__ == "__main__":
    main()
