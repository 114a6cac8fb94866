"""Nearest neighbors vote as scikit-learn's do, and an adaptor brings the training samples with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from end_to_end import CLASSES
from method_cases import DIM, build
from probe_data import draw, pooled
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import readout_of
from adapt.training.neighbors import take_neighbors
from adapt.training.objective import Objective
from adapt.training.seed_rows import SeedRows
from store.errors import JobError

TEMPERATURE = 0.2


def candidate(k: int, multi_label: bool = False) -> Candidate:
    model = build("knn", {"pool": "mean", "k": k, "temperature": TEMPERATURE})
    objective = Objective(multi_label=multi_label)
    data = SeedRows(seed=0, rows=np.arange(200), val_rows=np.arange(50), objective=objective)
    return Candidate(model, None, 0.0, data=data, method="knn")


def taught(k: int, features: Tensor, labels: Tensor, multi_label: bool = False) -> Candidate:
    one = candidate(k, multi_label)
    readout_of(one).standardize(features, torch.zeros(DIM))
    take_neighbors([one], pooled(labels, features), Objective(multi_label=multi_label), "voting")
    return one


def logits_of(one: Candidate, features: Tensor) -> Tensor:
    return readout_of(one).classify(features)


@pytest.mark.parametrize("k", [1, 5, 200, 1000])
def test_the_shares_are_scikit_learns(k: int) -> None:
    features, labels = draw()
    one, new = taught(k, features, labels), torch.randn(40, DIM, generator=torch.Generator().manual_seed(1))
    standardized = readout_of(one).standardized
    theirs = KNeighborsClassifier(
        min(k, len(labels)), metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(standardized(features).numpy(), labels.numpy())
    ours = logits_of(one, new).softmax(dim=1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(standardized(new).numpy()), atol=1e-3)


def test_shares_of_multi_label_data_are_those_of_every_class() -> None:
    features, labels = draw()
    several = torch.stack([labels == 0, labels < 2, labels >= 0], dim=1).long()
    single, multi = taught(7, features, labels), taught(7, features, several, multi_label=True)
    of_one, of_several = logits_of(single, features).softmax(dim=1), logits_of(multi, features).sigmoid()
    torch.testing.assert_close(of_several[:, 0], of_one[:, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(of_several[:, 1], of_one[:, :2].sum(dim=1), atol=1e-3, rtol=0)
    assert (of_several[:, 2] > 0.999).all()


def test_features_that_are_not_finite_are_refused() -> None:
    features, labels = draw()
    features[3, 2] = float("nan")
    with pytest.raises(JobError, match="not finite"):
        take_neighbors([candidate(3)], pooled(labels, features), Objective(multi_label=False), "voting")


def test_a_job_chooses_k_and_its_adaptor_gives_the_predictions_of_the_run(tiny_config: Any) -> None:
    config: Config = tiny_config("methods=[{name: knn, sweep: {k: [1, 3, 7]}}]", "train.weight_decay=0.5")
    (row,) = sc.run(config)
    scores: list[Path] = list((config.run_dir / "search").iterdir())
    assert scores[0].read_text().count('"k"') == 3
    assert row.searched == ["k"]
    assert (row.lr, row.weight_decay, row.trainable_params, row.head_params) == (None, 0.0, 0, 0)
    (path,) = (config.run_dir / "adaptors").glob("*.safetensors")
    adaptor = sc.load_adaptor(path, device="cpu")
    n_trained = len(adaptor.model.readout.head.samples)
    assert 0 < n_trained < 24
    saved = sc.read_predictions(next((config.run_dir / "predictions").iterdir()))
    store = sc.open_store(config.store.path)
    tokens = store.read("test", range(store.num_samples("test")))
    logits = adaptor.model({layer: torch.as_tensor(values) for layer, values in tokens.items()})
    np.testing.assert_allclose(logits.numpy(), saved.logits, atol=1e-4)
    assert CLASSES >= logits.shape[1] >= 2
