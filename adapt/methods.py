"""The table of methods: name -> options, builder, and what it trains from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from adapt.losa import Add, LoSA, Norm
from adapt.probes import LinearProbe
from adapt.readout import Pool
from adapt.spec import FeatureSpec
from store.config import Layers, PositiveInt, Section
from store.errors import UserError


class LinearProbeOptions(Section):
    """Options of `linear_probe`."""

    pool: Pool = "auto"


class LoSAOptions(Section):
    """Options of `losa`; see `adapt.losa.LoSA`."""

    rank: PositiveInt = 16
    token_rank: Annotated[int, Field(ge=0)] = 8
    norm: Norm = "layer"
    add: Add = "before_norm"
    pool: Pool = "auto"
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k} or {last: n}")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


@dataclass(frozen=True)
class Method:
    """One way to adapt a backbone. `build(spec, num_classes, **options)` returns the trainable model.

    `solved` methods are brought to their optimum (`adapt.solve`) and have no learning rate; the others are trained step
    by step (`adapt.train`).
    """

    options: type[Section]
    build: Callable[..., nn.Module]
    needs: Literal["features", "end_to_end"]
    solved: bool = False


METHODS: dict[str, Method] = {
    "linear_probe": Method(LinearProbeOptions, LinearProbe, "features", solved=True),
    "losa": Method(LoSAOptions, LoSA, "features"),
}


def find_method(name: str) -> Method:
    """The method of that name."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; legal: {', '.join(METHODS)}")
    return METHODS[name]


def build_model(name: str, spec: FeatureSpec, num_classes: int, options: Section) -> nn.Module:
    """A fresh model; its random draws come from torch's global generator."""
    kwargs: dict[str, Any] = {field: getattr(options, field) for field in type(options).model_fields}
    return find_method(name).build(spec, num_classes, **kwargs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def learned_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training leaves behind: the trained parameters, and the standardisation that the head stands on."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if name.startswith("readout.")}
    return trainable(model) | {name: tensor for name, tensor in buffers.items() if "tail" not in name}


def count_params(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters without the head, parameters of the head)."""
    head = sum(tensor.numel() for name, tensor in trainable(model).items() if ".head." in name)
    return sum(tensor.numel() for tensor in trainable(model).values()) - head, head
