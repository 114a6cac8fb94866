"""Head2Toe: a linear classifier on the most useful of the pooled features of all layers.

A linear head W on the pooled features of L layers is solved first; the features with the largest norm of their column
over all classes are kept,

    s_j = sqrt(sum_k W_kj^2),    kept: the `fraction` of all features j with the largest s_j

and a new head is solved on them alone.

The method is Head2Toe (Evci et al., arXiv 2201.03529): all weights of a feature are one group, features of all layers
compete, a second head is trained on those that win. Ours: both heads are solved to their optimum with weight decay, the
paper's first one is trained with a group lasso; of every layer class token and patch mean are read, the paper's pools
patches to a few cells.
"""

from typing import Annotated

from pydantic import Field

from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.from_features.linear_probe import LinearProbe, LinearProbeOptions
from adapt.methods.options import LAYERS_HELP, MethodOptions
from adapt.methods.readout import Pooling
from store.config import Layers


class Head2ToeOptions(MethodOptions):
    """Options of `head2toe`.

    Args:
        fraction: share of the pooled features that is kept.
        pool: what the head reads of every layer; see `adapt.methods.readout.Readout`.
        layers: which of the stored layers: all, a list of blocks, {every: k}, {spread: n} or {last: n} of those stored.
    """

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    pool: Pooling = "auto"
    layers: Layers = Field("all", description=LAYERS_HELP)


class Head2Toe(LinearProbe):
    """A linear classifier on the pooled tokens of some layers, whose weights are zero for features that are not kept.

    Args:
        spec: the features.
        num_classes: width of the classifier.
        options: see `Head2ToeOptions`.

    Raises:
        UserError: a layer that is not in the features.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int, options: Head2ToeOptions = Head2ToeOptions()) -> None:
        super().__init__(spec, num_classes, LinearProbeOptions(pool=options.pool, layers=options.layers))
        self.fraction = options.fraction
