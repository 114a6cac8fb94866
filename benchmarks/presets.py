"""Compares the presets of `store:` on test splits, and asks whether the pilot finds the one that suffices.

    python -m benchmarks.presets STUDY.yaml --out benchmarks/results/presets.json

Of every data set all training and test samples go through the backbone once. From what each preset would store of them
the linear probe of all layers (its weight decay chosen on validation), LoSA and the convolutional ladder (default
options and recipe) are trained from three seeds. A preset is worth the test accuracy of the method that validation
chooses. The pilot sees 400 training samples. It is right if it names the smallest preset that the test split confirms,
or a larger one: confirmed is what is not behind the best preset beyond the noise (one-sided paired test over the test
samples, level 0.05). Figures that FILE has already are not measured again.
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from adapt.config.pipeline import Config
from adapt.config.trials import parse_trial
from adapt.features.held import HeldFeatures, hold
from adapt.features.pooled import PooledFeatures
from adapt.job.extraction import extraction_job
from adapt.job.inputs import Inputs
from adapt.planning.pilot import run_pilot
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_split
from adapt.training.row_draw import RowDraw
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from benchmarks.studies import jobs_by_dataset, kept_figures, measure_datasets, study_parser
from benchmarks.tables import table
from extract.forward.device import configure_process
from store.config import PRESETS, Spread, StoreConfig

DECAYS = [10.0 ** (-power / 2) for power in range(12)]
LR, WEIGHT_DECAY = 0.003, 0.01
DEVIATIONS = 1.645  # of a normal distribution that leave 0.05 beyond
DRAW = RowDraw(val_fraction=0.2)


def entries_of(method: str, points: list[dict[str, Any]], seeds: range) -> list[Entry]:
    """The entries of some points of a method, seed by seed."""
    settings = Settings(epochs=15, batch_size=32)
    return [
        Entry(method=method, trial=parse_trial(method, point), seed=seed, settings=settings)
        for point in points
        for seed in seeds
    ]


def train_method(method: str, data: TrainingData, seeds: int) -> tuple[float, list[Candidate]]:
    """The validation score of the best point (seed 0), and its candidates, trained on validation rows too."""
    points: list[dict[str, Any]] = [{"lr": LR, "weight_decay": WEIGHT_DECAY}]
    if method == "linear_probe":
        points = [{"layers": "all", "weight_decay": decay} for decay in DECAYS]
    scored = train_entries(entries_of(method, points, range(1)), data, DRAW)
    best = max(range(len(points)), key=lambda k: scored[k].rank)
    refit = RowDraw(val_fraction=0.2, refit=True)
    return scored[best].score, train_entries(entries_of(method, [points[best]], range(seeds)), data, refit)


def measure_preset(train: HeldFeatures, test: HeldFeatures, seeds: int) -> dict[str, Any]:
    """By method: the validation score, and for every seed whether each test sample is right."""
    data, labels, found = TrainingData(PooledFeatures(train)), test.labels("test"), {}
    methods = ["linear_probe", "losa"] + (["conv_ladder"] if train.spec.layout.num_patches > 1 else [])
    for method in methods:
        score, trained = train_method(method, data, seeds)
        right = [(logits.argmax(dim=1) == labels).int().tolist() for logits in predict_split(trained, test, "test")]
        found[method] = {"val_score": score, "right": ["".join(map(str, of_seed)) for of_seed in right]}
    return found


def measure_set(config: Config, seeds: int, limit: int | None) -> dict[str, Any]:
    """All presets, and what the pilot says."""
    config = config.model_copy(update={"store": StoreConfig(preset="auto"), "methods": ["linear_probe"]})
    inputs = Inputs(config)
    stores = {preset: config.store.at_preset(preset) for preset in PRESETS}
    stores["full"] = stores["full"].model_copy(update={"layers": Spread(spread=4)})  # what side networks read of it
    job, cpu, held = extraction_job(config, inputs), torch.device("cpu"), {}
    for split in ("train", "test"):
        n_rows = len(inputs.source.splits[split])
        held[split] = hold(
            job, np.arange(n_rows)[:: max(1, n_rows // (limit or n_rows))], stores, device=cpu, split=split
        )
    presets = {name: measure_preset(held["train"][name], held["test"][name], seeds) for name in stores}
    presets["full"]["linear_probe"] = presets["probe"]["linear_probe"]  # it holds what is pooled of all layers too
    pilot = run_pilot(config, inputs)
    sizes = {preset.preset: preset.bytes_per_sample for preset in pilot.presets}
    return {"presets": presets, "bytes_per_sample": sizes, "pilot": pilot.model_dump(mode="json")}


def right_by_seed(of_preset: dict[str, Any]) -> np.ndarray:
    """Whether each test sample is right, by seed, of the method that validation chooses."""
    best = max(of_preset.values(), key=lambda one: one["val_score"])
    return np.array([[int(digit) for digit in of_seed] for of_seed in best["right"]])


def confirmed(of_set: dict[str, Any]) -> str:
    """The smallest preset that is not behind the best beyond the noise."""
    right = {preset: right_by_seed(found).mean(axis=0) for preset, found in of_set["presets"].items()}
    best = max(right.values(), key=lambda samples: float(samples.mean()))
    sizes: dict[str, int] = of_set["bytes_per_sample"]
    for preset in sorted(right, key=lambda name: sizes[name]):
        lost = best - right[preset]
        if lost.mean() <= DEVIATIONS * lost.std() / np.sqrt(len(lost)):
            return preset
    raise AssertionError("the best is not behind itself")


def rows_of_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Test accuracy of every preset, the smallest that suffices, and what the pilot says."""
    rows = []
    for name, of_set in results.items():
        sizes, chosen, enough = of_set["bytes_per_sample"], of_set["pilot"]["chosen"], confirmed(of_set)
        accuracies = [f"{100 * right_by_seed(of_set['presets'][preset]).mean():.2f}" for preset in PRESETS]
        verdict = "right" if sizes[chosen] >= sizes[enough] else "too small"
        rows.append([name, *accuracies, enough, chosen, verdict])
    return ["data set", *PRESETS, "suffices", "pilot", ""], rows


def main() -> None:
    """Measure what is missing, save after every set, print the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="about so many samples a split, to test the script")
    args = parser.parse_args()
    configure_process()
    settings = {"seeds": args.seeds, "limit": args.limit}
    figures, jobs = kept_figures(parser, args.out, settings), jobs_by_dataset(args.study)
    measure = partial(measure_set, **settings)
    print(table(*rows_of_table(measure_datasets(jobs, figures, args.out, measure, datasets=args.datasets))))


if __name__ == "__main__":
    main()
