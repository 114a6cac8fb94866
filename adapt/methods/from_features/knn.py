"""Nearest neighbors: the training samples whose pooled features are most similar vote for the class.

With the cosine similarity s_n of the standardized pooled features to those of training sample n,

    p_c = sum_{n in N, n is of class c} exp(s_n / T) / sum_{n in N} exp(s_n / T)        N: the k most similar samples

and the logits are log p, of multi-label data log p / (1 - p). Nothing is trained; an adaptor holds the features of all
training samples.

The classifier is that of the evaluation of DINO (Caron et al., arXiv 2104.14294), after Wu et al. (arXiv 1805.01978).
Ours: the features are standardized first, as those of every method.
"""

from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from adapt.methods.feature_spec import FeatureSpec, TokenBatch, TokensByLayer
from adapt.methods.options import LAYERS_HELP, MethodOptions, choose_layers
from adapt.methods.readout import Pooling, Readout
from store.config import Last, Layers, PositiveInt

_LEAST_SHARE = 1e-4  # of a class that no neighbor has


class KNNOptions(MethodOptions):
    """Options of `knn`.

    Args:
        k: how many samples vote; all, where there are fewer.
        temperature: T; the lower it is, the more the most similar ones count.
        pool: what the head reads and compares; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: all, a list of blocks, {every: k}, {spread: n} or {last: n} of those stored;
            their pooled features are concatenated.
    """

    k: PositiveInt = 20
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.07
    pool: Pooling = "auto"
    layers: Layers = Field(Last(last=1), description=LAYERS_HELP)


class NeighborHead(nn.Module):
    """The vote, in the place of the linear head of a read-out; without samples until `fill` is called.

    Args:
        width: of the features.
        num_classes: number of classes.
        options: see `KNNOptions`.
    """

    def __init__(self, width: int, num_classes: int, options: KNNOptions) -> None:
        super().__init__()
        self.in_features, self.out_features, self.options = width, num_classes, options
        self.samples: Float[Tensor, "samples features"]
        self.labels: Float[Tensor, "samples classes"]
        self.multi_label: Bool[Tensor, ""]
        self.register_buffer("multi_label", torch.zeros((), dtype=torch.bool))
        self.allocate(0)

    def allocate(self, n_samples: int) -> None:
        """Make room for as many samples as a file holds."""
        device = self.multi_label.device
        self.register_buffer("samples", torch.zeros(n_samples, self.in_features, device=device))
        self.register_buffer("labels", torch.zeros(n_samples, self.out_features, device=device))

    def fill(
        self,
        samples: Float[Tensor, "samples features"],
        labels: Float[Tensor, "samples classes"],
        multi_label: bool,
    ) -> None:
        """Take the training samples.

        Args:
            samples: their features, normalized to length 1.
            labels: 1 for the classes of a sample, 0 for the others.
            multi_label: whether a sample may have several classes.
        """
        self.samples, self.labels = samples, labels
        self.multi_label.fill_(multi_label)

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        similarity = F.normalize(features, dim=1) @ self.samples.T
        nearest = similarity.topk(min(self.options.k, len(self.samples)), dim=1)
        weight = (nearest.values / self.options.temperature).softmax(dim=1)
        share = (weight[:, :, None] * self.labels[nearest.indices]).sum(dim=1).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
        return torch.where(self.multi_label, share.logit(), share.log())


class KNN(nn.Module):
    """Nearest neighbors among the pooled tokens of some layers, which are concatenated.

    Args:
        spec: the features.
        num_classes: number of classes.
        options: see `KNNOptions`.

    Raises:
        UserError: a layer that is not in the features.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: KNNOptions = KNNOptions()) -> None:
        super().__init__()
        self.layers = choose_layers(options.layers, spec)
        self.readout = Readout(spec, num_classes, options.pool, self.layers)
        head: Any = NeighborHead(self.readout.head.in_features, num_classes, options)
        self.readout.head = head

    def forward(self, tokens: TokensByLayer) -> Float[Tensor, "batch classes"]:
        """Logits from {layer: (batch, tokens, dim)}."""
        return self.readout.classify(self.readout.pooled(TokenBatch.of(tokens)))
