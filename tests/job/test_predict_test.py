"""Predictions of the test split are one a sample, with the labels, ids and metrics of the split."""

from collections.abc import Callable

import pytest

from adapt.config.pipeline import Config
from adapt.job.extraction import extract
from adapt.job.feature_set import FeatureSet, open_features
from adapt.job.inputs import Inputs
from adapt.job.predict_test import predict_test
from adapt.methods.registry import build_model, find_method
from adapt.report.predicted_metrics import metrics_of
from adapt.training.loop import evaluate_split

MakeConfig = Callable[..., Config]


def opened(config: Config) -> FeatureSet:
    inputs = Inputs(config)
    if config.train.feature_source != "online":
        extract(config, inputs)
    return open_features(config, inputs, lambda _: None)


@pytest.mark.parametrize("source", ["resident", "streamed", "online"])
def test_predictions_have_the_metrics_and_names_of_the_test_split(tiny_config: MakeConfig, source: str) -> None:
    config = tiny_config(f"train.feature_source={source}")
    features = opened(config)
    batches = features.pooled.features
    model = build_model("losa", batches.spec, 3, find_method("losa").options()).to(batches.device)
    found = predict_test(model, features, batches, "float32", trial_id="t")
    assert metrics_of(found) == evaluate_split(model, batches, "test")
    ids = list(features.inputs.source.splits["test"].ids)
    assert list(found.sample_ids) == ids
    assert found.classes == ("blue", "green", "red")
    assert [found.classes[label] for label in found.labels] == [name.split("/")[-2] for name in ids]
