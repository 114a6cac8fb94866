"""Measures how long the cache takes to be as good as LoRA: `python -m benchmarks.until_lora STUDY.yaml --out FILE`.

Of every data set of the study LoRA is trained end to end, with one learning rate and without a search. Its score on
validation rows is the goal. Then the images go through the backbone once, into a store of the preset `grid`, and
methods are trained from it, each with a search, in the order of `STEPS` until one reaches the goal on the same
validation rows. All seconds are those of whole jobs, with loading, validation and test. Figures that FILE has already
are not measured again. Prints the table of docs/performance.md.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sidecache as sc
from adapt.config.pipeline import Config
from benchmarks.studies import jobs_by_dataset, kept_figures, measure_datasets, study_parser
from benchmarks.tables import table
from extract.forward.device import configure_process
from store.config import StoreConfig

LORA = {"name": "lora", "rank": 4, "lr": 0.003}
_DECAYS, _RATES = [10.0 ** (-power / 2) for power in range(12)], [0.001, 0.003, 0.01]
STEPS: tuple[dict[str, Any], ...] = (
    {"name": "linear_probe", "layers": "all", "sweep": {"weight_decay": _DECAYS}},
    {"name": "linear_probe", "layers": "all", "pool": "flatten", "sweep": {"weight_decay": _DECAYS[2::2]}},
    {"name": "conv_ladder", "sweep": {"lr": _RATES}},
    {"name": "losa", "rank": 16, "sweep": {"lr": _RATES}},
    {"name": "attentive_probe", "sweep": {"lr": _RATES}},
)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def job(config: Config, folder: str, method: dict[str, Any], epochs: int) -> Config:
    """A job with one method and one seed in a folder; LoRA reads no store."""
    changes = {"epochs": epochs, "batch_size": 32, "seeds": (0,), "refit": False, "workers": 1, "halving": None}
    changes["feature_source"] = "online" if method is LORA else "auto"
    return config.model_copy(
        update={
            "run_dir": Path(tempfile.mkdtemp(dir=folder)),
            "search": config.search.model_copy(update={"epochs": None}),
            "store": StoreConfig(preset="grid", path=f"{folder}/cache.zarr"),
            "train": config.train.model_copy(update=changes),
            "methods": [method],
        }
    )


def measure_set(config: Config, epochs: int) -> dict[str, Any]:
    """Seconds of LoRA, of the extraction, and of every method until one is as good."""
    with tempfile.TemporaryDirectory() as folder:
        lora_seconds, rows = timed(lambda: sc.train(job(config, folder, LORA, epochs)))
        found = {"lora": {"seconds": lora_seconds, "val_score": rows[0].val_score, "test": rows[0].top1}}
        extract_seconds, _ = timed(lambda: sc.extract(job(config, folder, STEPS[0], epochs)))
        steps = []
        for method in STEPS:
            seconds, rows = timed(lambda method=method: sc.train(job(config, folder, method, epochs)))  # type: ignore[misc]
            steps.append({"method": method, "seconds": seconds, "val_score": rows[0].val_score, "test": rows[0].top1})
            if rows[0].val_score >= found["lora"]["val_score"]:
                break
    return found | {"extract_seconds": extract_seconds, "steps": steps}


def rows_of_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How many times as long LoRA takes, with the extraction and without; all methods that were tried count."""
    rows = []
    for name, found in results.items():
        lora, last = found["lora"], found["steps"][-1]
        further = sum(step["seconds"] for step in found["steps"])
        reached = "" if last["val_score"] >= lora["val_score"] else " (not reached)"
        rows.append(
            [
                name,
                f"{lora['val_score']:.1f}",
                f"{last['val_score']:.1f}{reached}",
                f"{lora['test']:.1f}",
                f"{last['test']:.1f}",
                " ".join(map(str, (last["method"]["name"], last["method"].get("pool", "")))).strip(),
                f"{lora['seconds'] / (found['extract_seconds'] + further):.1f}",
                f"{lora['seconds'] / further:.0f}",
            ]
        )
    headers = ["", "LoRA, validation", "cache, validation", "LoRA, test", "cache, test", "method"]
    return [*headers, "first adaptor, times as fast", "further ones"], rows


def main() -> None:
    """Measure what is missing, save after every set, print the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    configure_process()
    figures = kept_figures(parser, args.out, {"epochs": args.epochs})
    measure, jobs = partial(measure_set, epochs=args.epochs), jobs_by_dataset(args.study)
    print(table(*rows_of_table(measure_datasets(jobs, figures, args.out, measure, datasets=args.datasets))))


if __name__ == "__main__":
    main()
