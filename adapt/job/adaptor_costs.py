"""Measures what adaptors cost in use: operations and milliseconds an image, those of the shared backbone apart."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from adapt.adaptors.trained import TrainedAdaptor, layers_of
from adapt.job.cost import backbone_gflops, inference_gflops
from adapt.methods.feature_spec import TokenBatch, TokensByLayer
from adapt.methods.registry import find_method
from extract.backbones.backbone import Images, ModelBackbone, empty_backbone
from extract.forward.device import synchronize, to_device

_ROUNDS = 3
_SAMPLES = 64  # of a batch that is timed, at most; a GPU is then busy


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the backbone or of an adaptor.

    Args:
        name: of the backbone or the adaptor.
        gflops: for one image, in 10^9 operations; None for a backbone that is no named model.
        milliseconds: for one image of a batch, without decoding.
        has_own_pass: whether it is an adaptor inside the backbone, with a forward pass of its own.
    """

    name: str
    gflops: float | None
    milliseconds: float
    has_own_pass: bool = False


@dataclass(frozen=True, kw_only=True)
class AdaptorCosts:
    """Costs of adaptors that share a backbone; those of an adaptor are besides the backbone's, unless it has its own.

    Args:
        backbone: None if no adaptor reads the tokens of the frozen backbone.
        adaptors: in the order they were given.
    """

    backbone: Cost | None
    adaptors: tuple[Cost, ...]

    def lines(self) -> Iterator[str]:
        """One line for the backbone and for each adaptor."""
        if self.backbone:
            yield f"backbone {self.backbone.name}: {_figures(self.backbone)}"
        for cost in self.adaptors:
            kind = "with its own copy of the backbone" if cost.has_own_pass else "besides the backbone"
            yield f"adaptor {cost.name}: {_figures(cost)}, {kind}"


@torch.no_grad()
def measure_costs(adaptors: Sequence[TrainedAdaptor]) -> AdaptorCosts:
    """Count the operations of adaptors that share a backbone, and time them on one batch of noise."""
    forward, shape = adaptors[0].forward, _shape_of(adaptors[0])
    layers = layers_of(adaptors)
    images = torch.rand(min(_SAMPLES, forward.batch_size(_SAMPLES)), *forward.backbone.image_size)
    images = to_device(images, forward.device)
    tokens: TokensByLayer = {}
    frozen = None
    if layers:
        tokens = forward(images, layers)
        frozen = Cost(
            name=forward.backbone.name,
            gflops=backbone_gflops(layers, shape) if shape else None,
            milliseconds=_milliseconds(lambda: forward(images, layers), images),
        )
    return AdaptorCosts(
        backbone=frozen, adaptors=tuple(_measure(adaptor, shape, images, tokens) for adaptor in adaptors)
    )


def _measure(adaptor: TrainedAdaptor, shape: ModelBackbone | None, images: Images, tokens: TokensByLayer) -> Cost:
    def run() -> None:
        adaptor.logits_of(images if adaptor.trains_backbone else TokenBatch(tokens))

    return Cost(
        name=adaptor.name,
        gflops=_gflops(adaptor, shape) if shape else None,
        milliseconds=_milliseconds(run, images),
        has_own_pass=adaptor.trains_backbone,
    )


def _shape_of(adaptor: TrainedAdaptor) -> ModelBackbone | None:
    """The backbone on the meta device; None for a module of the user."""
    backbone = adaptor.forward.backbone
    if not isinstance(backbone, ModelBackbone):
        return None
    clips = adaptor.card.clips
    return empty_backbone(backbone.name, backbone.model_kwargs, clips.frames if clips else None)


def _gflops(adaptor: TrainedAdaptor, shape: ModelBackbone) -> float:
    card = adaptor.card
    options = find_method(card.method).options.model_validate(card.options)
    whole = inference_gflops(card.method, options, card.layers, len(card.classes), backbone=shape, tokens=card.tokens)
    return whole if adaptor.trains_backbone else whole - backbone_gflops(adaptor.layers, shape)


def _milliseconds(run: Callable[[], object], images: Images) -> float:
    """Of one image; the median of some rounds after one that warms up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        run()
        synchronize(images.device)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[1:]) / len(images)


def _figures(cost: Cost) -> str:
    operations = "" if cost.gflops is None else f"{cost.gflops:.3g} GFLOPs, "
    return f"{operations}{cost.milliseconds:.3g} ms an image"
