"""Features and labels of classes that overlap, for heads that are solved."""

import torch
from end_to_end import CLASSES
from method_cases import DIM
from torch import Tensor

from adapt.training.linear_solver import ProbeData


def draw(total: int = 200) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that the optimum is finite."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    features = torch.randn((total, DIM), generator=generator)
    features[torch.arange(total), labels] += 1.5
    return features, labels


def pooled(labels: Tensor, features: Tensor) -> ProbeData:
    return ProbeData(features, labels, features[:50], labels[:50])
