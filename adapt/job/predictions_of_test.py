"""Makes the predictions of a trial on the test split, with ids and labels of its samples."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from adapt.job.feature_set import FeatureSet
from adapt.run_dir.predictions import Predictions


def predictions_of(features: FeatureSet, trial_id: str, logits: Float[Tensor, "samples classes"]) -> Predictions:
    """The predictions of a trial.

    Args:
        features: the features of the job.
        trial_id: the trial.
        logits: of every sample of the test split, averaged over its views.
    """
    source = features.pooled.features
    labels = source.labels("test")[:: source.views].cpu().numpy()
    return Predictions(
        trial_id=trial_id,
        classes=features.facts.classes,
        sample_ids=tuple(sample.encode(errors="backslashreplace").decode() for sample in features.sample_ids("test")),
        labels=labels.astype(np.int64 if labels.ndim == 1 else np.uint8),
        logits=logits.numpy(),
    )
