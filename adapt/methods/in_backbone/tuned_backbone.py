"""The model of every method that trains inside the backbone: a copy of the backbone, changed, under the read-out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from adapt.methods.in_backbone.target_modules import TargetViT
from adapt.methods.options import MethodOptions
from adapt.methods.readout import Pooling, Readout
from store.layout import TokenLayout

Inject = Callable[[TargetViT, Any], None]


class TunedOptions(MethodOptions):
    """Options of every method that trains inside the backbone.

    Args:
        pool: what the head reads; see `adapt.methods.readout.Readout`.
    """

    pool: Pooling = "auto"


@runtime_checkable
class TrainableBackbone(Protocol):
    """A frozen backbone whose copy methods may train: one of `extract.backbones.backbone.ModelBackbone`.

    Attributes:
        module: the model.
        layout: prefix tokens and patch grid.
        block_layout: those that one block sees: of one frame, for a backbone that runs frame by frame.
        tail: final norm and pooling.
    """

    module: nn.Module
    layout: TokenLayout
    block_layout: TokenLayout
    tail: Any

    def trainable_copy(self, depth: int) -> "TrainableBackbone":
        """Copy the first `depth` blocks; the copy's final norm is that of its module."""
        ...

    def tokens(self, images: Float[Tensor, "batch ..."], layers: Sequence[int]) -> TokensByLayer:
        """Block outputs of the chosen layers."""
        ...


class TunedBackbone(nn.Module):
    """A copy of the backbone up to the last layer of the spec, changed by a method, and its classifier.

    Args:
        backbone: the frozen model, which is not changed.
        spec: the features of that backbone; the last of their layers is read.
        num_classes: width of the classifier.
        inject: changes a `TargetViT` in place; `requires_grad` marks what is trained.
        options: those of the method, for `inject`.
    """

    def __init__(
        self,
        backbone: TrainableBackbone,
        spec: FeatureSpec,
        num_classes: int,
        *,
        inject: Inject,
        options: TunedOptions,
    ) -> None:
        super().__init__()
        self.readout = Readout(spec, num_classes, options.pool)  # first: all methods draw the same head from a seed
        self.layers = spec.layers[-1:]
        self._backbone = backbone.trainable_copy(self.layers[-1] + 1)
        self.module, self.readout.tail = self._backbone.module, self._backbone.tail
        self._vit = TargetViT(self.module, backbone.block_layout, spec.dim)
        inject(self._vit, options)
        if self.readout.mode != "backbone":
            self._backbone.tail.freeze_pooling()  # what is not read does not count as trained

    def checkpoint_blocks(self) -> None:
        """Recompute a block's activations in the backward pass instead of keeping them."""
        for block in self._vit.blocks:  # not by timm's switch: that of transformers has a new name every few releases
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def unfuse_attention(self) -> None:
        """Compute attention by products and a softmax; in bfloat16 on a CPU, the fused kernel's backward is slow."""
        for module in self.modules():
            if hasattr(module, "fused_attn"):  # of timm's attention layers
                module.fused_attn = False  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "TunedBackbone":
        """Set the mode, but leave batch norms in evaluation: an adaptor holds parameters only, no new statistics."""
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
