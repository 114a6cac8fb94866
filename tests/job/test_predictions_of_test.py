"""Predictions of the test split are one a sample, with the labels, ids and metrics of the split."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

import sidecache as sc
from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.report.predicted_metrics import metrics_of
from adapt.run_dir.predictions import predictions_path

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
def test_predictions_have_the_metrics_and_names_of_the_test_split(tiny_config: MakeConfig, source: str) -> None:
    config = tiny_config(f"train.feature_source={source}", "train.epochs=1")
    rows = sc.run(config)
    ids = set(Inputs(config).source.splits["test"].ids)
    for row in rows:
        found = sc.read_predictions(predictions_path(config.run_dir, row))
        assert found.trial_id == row.trial_id
        metrics = asdict(metrics_of(found))
        assert metrics == {name: getattr(row, name) for name in metrics}
        assert set(found.sample_ids) == ids
        assert found.classes == ("blue", "green", "red")
        assert [found.classes[label] for label in found.labels] == [name.split("/")[-2] for name in found.sample_ids]
