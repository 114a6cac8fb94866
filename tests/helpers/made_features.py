"""Makes features in memory that train in milliseconds, and candidates that are trained on them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from method_cases import build, make_spec
from torch import Tensor

from adapt.features.frozen import FrozenFeatures
from adapt.training.candidate import Candidate
from adapt.training.evaluation import predict_split
from adapt.training.loop import TrainingPass, fit
from adapt.training.metrics import Metrics, evaluate
from adapt.training.row_draw import RowDraw
from adapt.training.seed_draw import rows_of_seed
from adapt.training.seed_rows import SeedRows
from adapt.training.settings import Settings

CLASSES = 5


class MadeFeatures(FrozenFeatures):
    """Tokens with the class in one patch: hard for a probe of the mean, easy for LoSA. All splits are the same rows."""

    kind = "made"
    views = 1

    def __init__(self, total: int = 60, multi_label: bool = False, at_once: int = 32) -> None:
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.spec = make_spec()
        self.device, self.at_once = torch.device("cpu"), at_once
        self.num_classes, self.multi_label = CLASSES, multi_label
        self.of_rows = torch.randint(0, CLASSES, (total,), generator=draw)
        shape = (total, self.spec.layout.num_tokens, self.spec.dim)
        self.tokens = {layer: torch.randn(shape, generator=draw) for layer in self.spec.layers}
        for values in self.tokens.values():
            values[torch.arange(total), 1, self.of_rows] += 6.0
        if multi_label:
            self.of_rows = torch.nn.functional.one_hot(self.of_rows, CLASSES).to(torch.uint8)

    def labels(self, split: str) -> Tensor:
        return self.of_rows

    def validation_rows(self) -> None:
        return None

    def samples_at_once(self, layers: Sequence[int]) -> int:
        return self.at_once

    def batches(
        self, split: str, groups: Sequence[np.ndarray], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[np.ndarray, Any]]:
        for rows in groups:
            yield rows, {layer: self.tokens[layer][torch.from_numpy(rows)] for layer in layers}


def make_rows(features: MadeFeatures, seed: int = 0, balanced: bool = False, refit: bool = False) -> SeedRows:
    """The rows of a seed: three quarters are trained on, the others validate."""
    return rows_of_seed(features, RowDraw(val_fraction=0.25, refit=refit), seed, balance_classes=balanced)


def make_candidate(
    data: SeedRows, lr: float = 0.01, method: str = "losa", contest: str = "", **options: Any
) -> Candidate:
    """A candidate whose initial weights are always the same."""
    torch.manual_seed(0)
    options = {"rank": 4, "token_rank": 2, "pool": "mean"} | options if method == "losa" else options
    return Candidate(build(method, options), lr, 0.01, data=data, method=method, contest=contest)


def train(candidates: Sequence[Candidate], features: Any, settings: Settings, **more: Any) -> None:
    """Train candidates in one pass."""
    checkpoint = more.pop("checkpoint", None)
    fit(TrainingPass(candidates=candidates, inputs=features, settings=settings, **more), checkpoint)


def metrics_of(trained: Candidate, features: Any) -> Metrics:
    """Metrics on the whole split."""
    (logits,) = predict_split([trained], features, "train")
    return evaluate(logits, features.labels("train")[:: features.views])
