"""What an adaptor says of one image or video."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of one image or video with their probabilities, or why it could not be read.

    Attributes:
        name: the path as it was given; of an image in memory `image N`, N counted from 0.
        adaptor: the name of the adaptor.
        label: the most probable class; None if it could not be read.
        probability: of that class.
        probabilities: class -> probability, in the order of the classes; of the K most probable ones with the most
            probable first if only these were asked for.
        error: why it could not be read; None if it was.
    """

    name: str
    adaptor: str
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        adaptor: str,
        *,
        classes: Sequence[str],
        probabilities: Float[Tensor, "classes"],
        top: int | None = None,
    ) -> "Prediction":
        """The prediction of a file that was read; `top` limits the classes to the most probable ones."""
        best = int(probabilities.argmax())
        ranked = range(len(classes)) if top is None else probabilities.argsort(descending=True, stable=True)[:top]
        values = probabilities.tolist()
        return cls(
            name=name,
            adaptor=adaptor,
            label=classes[best],
            probability=values[best],
            probabilities={classes[int(k)]: values[int(k)] for k in ranked},
        )
