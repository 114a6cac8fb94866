"""Computes the metrics of a trial from its predictions."""

import torch

from adapt.run_dir.predictions import Predictions
from adapt.training.metrics import Metrics, evaluate


def metrics_of(predictions: Predictions) -> Metrics:
    """The metrics that `adapt.training.metrics.evaluate` gives for these logits and labels."""
    return evaluate(torch.tensor(predictions.logits), torch.tensor(predictions.labels))
