"""Predicts the test split with a trained model: the only read of that split."""

import numpy as np
from torch import nn

from adapt.job.feature_set import FeatureSet
from adapt.run_dir.predictions import Predictions
from adapt.training.loop import Batches, predict_logits
from adapt.training.metrics import average_views


def predict_test(
    model: nn.Module, features: FeatureSet, batches: Batches, precision: str, trial_id: str
) -> Predictions:
    """Predict every sample of the test split.

    Args:
        model: a trained model.
        features: the features of the job.
        batches: what the model reads: those features, or the images behind them.
        precision: of the forward pass.
        trial_id: of the trial that the model belongs to.
    """
    labels, ids = batches.labels("test"), features.sample_ids("test")
    (logits,) = predict_logits([model], batches, "test", np.arange(len(labels)), precision=precision)
    of_samples = labels[:: batches.views].cpu().numpy()
    return Predictions(
        trial_id=trial_id,
        classes=features.facts.classes,
        sample_ids=tuple(sample.encode(errors="backslashreplace").decode() for sample in ids),
        labels=of_samples.astype(np.int64 if of_samples.ndim == 1 else np.uint8),
        logits=average_views(logits, batches.views).numpy(),
    )
