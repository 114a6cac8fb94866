"""Trainings of fixed seeds give the recorded losses: what changes them must raise TRAINING_VERSION.

`SIDECACHE_RECORD_LOSSES=1 pytest -n 0 tests/adapt/test_training_version.py` records those of another version, or of a
method that has none yet. Models are trained without dropout, whose masks differ between CPUs; its seeds are recorded.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from end_to_end import tune
from made_features import MadeFeatures, make_rows
from method_cases import CASES, TUNED_CASES

import adapt.training.stacks
from adapt.config.trials import Trial
from adapt.features.pooled import PooledFeatures
from adapt.methods.registry import find_method
from adapt.training.candidate import Candidate
from adapt.training.loop import TrainingPass, fit
from adapt.training.row_draw import RowDraw
from adapt.training.seed_part import PartRows, SeedParts
from adapt.training.settings import Settings
from adapt.training.trials import Entry, TrainingData, train_entries
from adapt.training.version import TRAINING_VERSION
from extract.backbones.backbone import TimmBackbone

FILE = Path(__file__).with_name("training_losses.json")
RECORDS = "SIDECACHE_RECORD_LOSSES" in os.environ
ADVICE = (
    "the same configuration gives other results than before: if that is meant, raise TRAINING_VERSION in "
    "adapt/training/version.py, so that finished trials are trained again, and record the losses as this file says"
)
SETTINGS = Settings(epochs=3, batch_size=10, shuffle_block=3, balance_classes=True)
FEATURES = MadeFeatures(total=32, at_once=7)
END_TO_END = [(method, options) for method, options, _ in TUNED_CASES if method in ("lora", "bitfit")]
Losses = dict[str, list[float]]


def losses_from_features() -> Losses:
    """The training losses of all epochs of every case, and the validation loss; of a probe only the latter."""
    entries = [_entry(method, options, seed) for method, options, *_ in CASES for seed in (0, 1)]
    found: list[list[float]] = [[] for _ in entries]
    position = {id(entry): number for number, entry in enumerate(entries)}
    trained = train_entries(
        entries,
        TrainingData(PooledFeatures(FEATURES)),
        RowDraw(val_fraction=0.25),
        on_epoch=lambda entry, each: found[position[id(entry)]].append(each.train_loss),
    )
    for candidate, losses in zip(trained, found, strict=True):
        losses[:] = [loss for loss in losses if np.isfinite(loss)] + [candidate.loss]
    keys = [f"{method} {json.dumps(options)} seed {seed}" for method, options, *_ in CASES for seed in (0, 1)]
    return dict(zip(keys, found, strict=True))


def _entry(method: str, options: dict[str, Any], seed: int) -> Entry:
    parsed = find_method(method).options.model_validate(options)
    lr = None if find_method(method).solved else 0.02
    return Entry(
        method=method,
        trial=Trial(options=parsed, lr=lr, weight_decay=0.05),
        seed=seed,
        settings=SETTINGS,
    )


class Images(MadeFeatures):
    """Random images by row, with mixup."""

    def __init__(self) -> None:
        super().__init__(total=16)
        self.images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def batches(self, split: str, groups: Any, layers: Any, together: int = 1) -> Any:
        return ((rows, self.images[torch.from_numpy(rows)]) for rows in groups)


def losses_end_to_end(backbone: TimmBackbone) -> Losses:
    """The same of methods that train inside the backbone."""
    found: Losses = {}
    images = Images()
    for method, options in END_TO_END:
        losses: list[float] = []
        model = tune(method, options, backbone)
        candidate = Candidate(model, 0.003, 0.05, data=make_rows(images), method=method)
        settings = Settings(epochs=2, batch_size=6, mixup=0.4, optimizer="sgd")
        job = TrainingPass(
            candidates=[candidate],
            inputs=images,
            settings=settings,
            on_epoch=lambda each, losses=losses: losses.append(each.train_loss),
        )
        fit(job)
        found[f"{method} {json.dumps(options)}"] = [*losses, candidate.loss]
    return found


def random_seeds() -> Losses:
    """The last digits of the seeds that dropout is drawn from."""
    data = make_rows(FEATURES, seed=5)
    parts, rows = SeedParts(data, FEATURES.labels("train"), FEATURES.device), data.rows[:4]
    found = []
    for epoch, step, number in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        part = parts.part(PartRows(rows, rows, epoch=epoch, step=step, number=number), torch.zeros(4, 2), SETTINGS)
        assert part
        found.append(part.random_seed % 1e4)
    return {"dropout": found}


def compare(losses: Losses) -> None:
    """Compare losses with the recorded ones to half a percent, which other CPUs and versions of torch keep."""
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {"version": 0, "losses": {}}
    known = recorded["losses"] if recorded["version"] == TRAINING_VERSION or not RECORDS else {}
    for key, values in losses.items():
        if key in known:
            assert values == pytest.approx(known[key], rel=5e-3), f"{key}: {ADVICE}"
        else:
            assert RECORDS, f"{key} has no recorded losses: record them as this file says"
    if RECORDS:
        rounded = {key: [float(f"{loss:.4g}") for loss in values] for key, values in losses.items()}
        document = {"version": TRAINING_VERSION, "losses": known | rounded}
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    else:
        assert recorded["version"] == TRAINING_VERSION, "record the losses of this version as this file says"


@pytest.mark.parametrize("train", [losses_from_features, losses_end_to_end, random_seeds])
def test_trainings_give_the_losses_of_their_version(train: Callable[..., Losses], tiny_backbone: TimmBackbone) -> None:
    compare(train(tiny_backbone) if train is losses_end_to_end else train())


def test_a_change_of_the_arithmetic_is_noticed(monkeypatch: pytest.MonkeyPatch, tiny_backbone: TimmBackbone) -> None:
    """A learning rate that is a tenth higher."""
    made = adapt.training.stacks.make_optimizer
    monkeypatch.setattr(
        adapt.training.stacks, "make_optimizer", lambda *args, lr, **more: made(*args, lr=1.1 * lr, **more)
    )
    with pytest.raises(AssertionError, match="raise TRAINING_VERSION"):
        compare(losses_end_to_end(tiny_backbone))
