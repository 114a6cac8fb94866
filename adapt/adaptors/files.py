"""Saves and loads trained adaptors: a safetensors file of the trained tensors, with a JSON card beside it.

Neither file is trusted. The card names the backbone as a configuration does, so loading an adaptor loads a local file
or weights of the model hub, unless the caller passes the backbone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adapt.adaptors.adaptor import Adaptor
from adapt.adaptors.backbone import load_backbone_of, require_backbone_of
from adapt.adaptors.card import Card, card_document, card_path, read_card, reading, write_card
from adapt.adaptors.trained import require_same_backbone
from adapt.config.messages import explain
from adapt.features.specs import spec_of_backbone
from adapt.methods.from_features.knn import KNN
from adapt.methods.registry import build_model, find_method
from adapt.methods.trained_parameters import adapter_state_dict
from extract.backbones.backbone import Backbone
from extract.backbones.timm_models import first_line
from extract.config import ExtractConfig
from extract.forward.device import configure_process
from extract.forward.frozen_forward import FrozenForward
from store.errors import JobError, UserError
from store.layout import resolve_layers
from store.local.durable_files import remove_leftovers, replacing

Shapes = dict[str, tuple[int, ...]]


def save_adaptor(path: Path, model: nn.Module, card: Card) -> None:
    """Write `path` (.safetensors) and its card (.json beside it).

    Raises:
        JobError: a file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial)
            document = card_document(card.model_dump(mode="json"), partial)
    except (OSError, SafetensorError) as error:
        raise JobError(f"{path} cannot be written ({error})") from error
    write_card(path, document)


def load_adaptor(
    path: str | Path, backbone: Backbone | None = None, device: str = "auto", weights: str | Path | None = None
) -> Adaptor:
    """Load an adaptor onto its backbone.

    Args:
        path: the .safetensors file, with its card beside it.
        backbone: the frozen model; by default the one that the card names is loaded.
        device: auto, cpu or cuda.
        weights: of the backbone, if they were moved; by default where the card says, else beside the adaptor, in its
            run directory or in the cache of the model hub. Their content must be that of the training.

    Raises:
        UserError: a file is missing or damaged, or the backbone is not the one the adaptor was trained on.

    Example:
        >>> import glob
        >>> import numpy as np
        >>> import sidecache as sc
        >>> path = sorted(glob.glob("runs/digits/adaptors/losa-*.safetensors"))[0]
        >>> adaptor = sc.load_adaptor(path, device="cpu")
        >>> picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)  # or a path, or a PIL image
        >>> [prediction] = adaptor.predict(picture, top=3)
        >>> len(prediction.probabilities)
        3
        >>> adaptor.probabilities([picture, picture]).shape
        torch.Size([2, 10])
    """
    configure_process()
    if backbone is not None and weights is not None:
        raise UserError("backbone and weights were both given; give the backbone alone, it has its weights")
    path = Path(path)
    card = read_card(path)
    backbone = backbone or load_backbone_of(path, card, weights)
    require_backbone_of(path, card, backbone)
    return _load_onto(path, card, backbone, device)


def load_adaptors(paths: Sequence[Path], device: str = "auto", weights: str | Path | None = None) -> list[Adaptor]:
    """Load several adaptors onto the backbone that they share; see `load_adaptor`.

    Raises:
        UserError: as `load_adaptor`; they do not share their backbone.
    """
    configure_process()
    cards = [read_card(path) for path in paths]
    require_same_backbone(paths, cards)
    backbone = load_backbone_of(paths[0], cards[0], weights)
    require_backbone_of(paths[0], cards[0], backbone)
    return [_load_onto(path, card, backbone, device) for path, card in zip(paths, cards, strict=True)]


def _load_onto(path: Path, card: Card, backbone: Backbone, device: str) -> Adaptor:
    forward = FrozenForward(backbone, card.layers, card.tokens, ExtractConfig(device=device, precision=card.precision))
    model = _build_model(path, card, backbone)
    _load_tensors(path, model)
    return Adaptor(name=path.stem, card=card, model=model.to(forward.device).eval(), forward=forward)


def _build_model(path: Path, card: Card, backbone: Backbone) -> nn.Module:
    options_class = find_method(card.method).options
    try:
        resolve_layers(list(card.layers), backbone.depth)
        options = options_class.model_validate(card.options)
        spec = spec_of_backbone(backbone, card.layers, card.tokens)
        with torch.device("meta"):  # only shapes: a card that asks for huge tensors must not take memory
            planned = build_model(card.method, spec, len(card.classes), options, backbone=backbone)
            found = _shapes(path)
            _allocate_samples(planned, found)
    except (ValidationError, UserError, RuntimeError, MemoryError) as error:  # RuntimeError: torch, of too many values
        reason = explain(error, options_class) if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"{card_path(path)}, the card of an adaptor, is damaged: {reason}") from error
    _require_shapes(path, {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(planned).items()}, found)
    model = build_model(card.method, spec, len(card.classes), options, backbone=backbone)
    _allocate_samples(model, found)
    return model


def _allocate_samples(model: nn.Module, found: Shapes) -> None:
    """Make room for as many neighbors as the file holds; models of other methods have none."""
    if isinstance(model, KNN):
        head: Any = model.readout.head
        head.allocate(found.get("readout.head.samples", (0,))[0])


def _shapes(path: Path) -> Shapes:
    """The shapes of all tensors of a file; none is larger than the file, which safetensors checks."""
    with reading(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _require_shapes(path: Path, wanted: Shapes, found: Shapes) -> None:
    if wanted != found:
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:2]
        raise UserError(f"{path} does not hold the tensors that its card describes: {differing}")


def _load_tensors(path: Path, model: nn.Module) -> None:
    with reading(path):
        saved = load_file(path)
    for name, tensor in adapter_state_dict(model).items():
        if saved[name].dtype != tensor.dtype or not saved[name].isfinite().all():
            raise UserError(f"{path} is damaged: {name} does not hold finite numbers of type {tensor.dtype}")
    model.load_state_dict(saved, strict=False)
