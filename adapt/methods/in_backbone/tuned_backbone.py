"""A backbone that a method trains, under the read-out that every method has."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from adapt.methods.feature_spec import FeatureSpec, TrainableBackbone
from adapt.methods.in_backbone.target_modules import Vit
from adapt.methods.readout import Pool, Readout
from store.strict_model import StrictModel

Install = Callable[..., None]


class TunedOptions(StrictModel):
    """What every end-to-end method lets be chosen."""

    pool: Pool = "auto"


class Tuned(nn.Module):
    """A copy of the backbone with a method installed, up to the last layer of the spec.

    Args:
        backbone: the frozen model (`extract.backbones.backbone.TimmBackbone` is one); it stays as it is.
        spec: the features that the same backbone gives; the last of its layers is read.
        num_classes: width of the classifier.
        install: what makes the method: it changes a `Vit` in place and marks what is trained by `requires_grad`.
        pool: what the classifier reads; see `adapt.methods.readout.Readout`.
        options: keyword arguments of `install`.
    """

    def __init__(
        self,
        backbone: TrainableBackbone,
        spec: FeatureSpec,
        num_classes: int,
        install: Install,
        pool: Pool = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, pool)  # first, so that every method draws the same head from a seed
        self.layers = spec.layers[-1:]
        self._backbone = backbone.trainable_copy(self.layers[-1] + 1)
        self.module, self.readout.tail = self._backbone.module, self._backbone.tail
        self._vit = Vit(self.module, backbone.block_layout, spec.dim)
        install(self._vit, **options)
        if self.readout.mode != "backbone":
            self._backbone.tail.freeze_pooling()  # what is not read does not count as trained

    def checkpoint_blocks(self) -> None:
        """Compute a block's activations anew in the backward pass instead of keeping them."""
        for block in self._vit.blocks:  # not by timm's switch: that of transformers has a new name every few releases
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def train(self, mode: bool = True) -> "Tuned":
        """As of any module, but batch norms keep the backbone's statistics: of a model, parameters alone are saved."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Float[Tensor, "batch ... channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of preprocessed images or clips."""
        tokens = self._backbone.tokens(images, self.layers)[self.layers[-1]]
        logits: Tensor = self.readout(self.readout.normalize(tokens))
        return logits
