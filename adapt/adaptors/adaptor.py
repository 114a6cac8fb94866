"""A trained adaptor as its user has it: it classifies images, videos and preprocessed tensors."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from adapt.adaptors.items import Items, read_items
from adapt.adaptors.predict import OnError, compute_answers, predict
from adapt.adaptors.prediction import Prediction
from adapt.adaptors.raw_pixels import RawPixelCheck
from adapt.adaptors.trained import TrainedAdaptor, shared_logits
from extract.forward.frozen_forward import preprocess
from extract.images.decode import to_rgb


@dataclass(frozen=True, kw_only=True)
class Adaptor(TrainedAdaptor):
    """A trained model with its frozen backbone; `load_adaptor` makes it."""

    _check: RawPixelCheck = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_check", RawPixelCheck(self.forward.backbone.transform))

    def predict(self, items: Items, top: int | None = None, on_error: OnError = "fail") -> list[Prediction]:
        """Classify paths, PIL images and arrays (height, width, 3) of uint8 in any mix, or a single one.

        See `adapt.adaptors.predict.predict`, which does the same for several adaptors at once.
        """
        return predict([self], items, top, on_error)[0]

    def probabilities(self, images: Tensor | Items) -> Float[Tensor, "batch classes"]:
        """Class probabilities on the CPU; see `logits` for what is legal and `classify` for multi-label."""
        return self.classify(self.logits(images))

    @torch.no_grad()
    def logits(self, images: Tensor | Items) -> Float[Tensor, "batch classes"]:
        """Logits on the CPU.

        Args:
            images: preprocessed images (batch, channels, height, width) or clips (batch, frames, channels, ...); or
                whatever `predict` takes, which gets the backbone's own transform.
        """
        if not isinstance(images, Tensor):
            return compute_answers([self], read_items(images, self.card.clips)).logits[0]
        self._check.warn_of(images)
        return shared_logits([self], images.float())[0].cpu()

    def transform(self, image: Image.Image) -> Float[Tensor, "channels height width"]:
        """Preprocess an image, or one frame of a clip, as the backbone wants it."""
        return preprocess(self.forward.backbone.transform, to_rgb(image, "image"), "image")
