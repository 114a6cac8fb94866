"""Saves and loads trained adaptors: a safetensors file of the trained tensors, with a JSON card beside it.

The card holds a digest of the tensors' file and a checksum of itself, so a file that was damaged, edited or exchanged
is refused. Of the card only `backbone.weights` may be edited, for weights that were moved: their content has its own
digest.

Neither file is trusted. The card names the backbone as a configuration does, so loading an adaptor loads a local file
or weights of the model hub, unless the caller passes the backbone.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adapt.config.messages import explain
from adapt.config.variables import expand_text
from adapt.features.specs import spec_of_backbone
from adapt.methods.from_features.knn import KNN
from adapt.methods.registry import build_model, find_method
from adapt.methods.trained_parameters import adapter_state_dict
from adapt.run_dir.files import CHECKSUM, parse_json, read_text, with_checksum, without_checksum, write_text
from extract.backbones.backbone import Backbone, digests, load_backbone
from extract.backbones.timm_models import first_line
from extract.config import BackboneConfig, ClipConfig, ExtractConfig
from extract.forward.device import autocast, configure_process
from extract.forward.frozen_forward import FrozenForward
from store.config import Tokens
from store.errors import JobError, UserError
from store.layout import resolve_layers
from store.local.durable_files import remove_leftovers, replacing

_MOST_CARD_BYTES = 16 << 20
_DIGEST = "tensors_digest"  # field of the card on disk: the digest of the tensors' file

_REMEDY = (
    "put back card and tensors as they were written together, or delete both and train again; to load it onto weights "
    "that were moved, change nothing but backbone.weights of the card"
)

Shapes = dict[str, tuple[int, ...]]


class Facts(BaseModel):
    """The part of a card that describes the features that the adaptor was trained on.

    Args:
        backbone: the frozen model.
        clips: how frames are sampled from videos; None for images.
        weights_digest: of the backbone's weights.
        preprocessing_digest: of its preprocessing.
        precision: of the frozen forward.
        layers: those of the features.
        tokens: which tokens of a layer are kept.
        classes: their names, in the order of the logits.
        multi_label: whether a sample may have several classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: BackboneConfig
    clips: ClipConfig | None = None
    weights_digest: str
    preprocessing_digest: str
    precision: Literal["float32", "bfloat16", "float16"]
    layers: tuple[int, ...]
    tokens: Tokens
    classes: tuple[str, ...]
    multi_label: bool


class Card(Facts):
    """All that is needed to use an adaptor, and its metrics on the test split.

    Args:
        method: its name.
        options: those of the method.
        metrics: in percent.
        train_precision: of the model.
    """

    method: str
    options: dict[str, Any]
    metrics: dict[str, float | None]
    train_precision: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Adaptor:
    """A trained model with the frozen backbone that computes its inputs."""

    card: Card
    model: nn.Module
    forward: FrozenForward

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities on the CPU; see `logits` for the shapes and `classify` for multi-label."""
        return self.classify(self.logits(images))

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, channels, height, width) or clips (batch, frames, channels, ...) -> (batch, classes)."""
        trains_backbone = find_method(self.card.method).trains_backbone
        inputs = images.to(self.forward.device) if trains_backbone else self.forward(images)
        with autocast(self.forward.device, self.card.train_precision):
            logits: torch.Tensor = self.model(inputs)
        return logits.float().cpu()

    def classify(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of logits: softmax, or sigmoid for multi-label."""
        return logits.sigmoid() if self.card.multi_label else logits.softmax(dim=1)


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
    write_text(path.with_suffix(".json"), json.dumps(document, indent=1, ensure_ascii=False))


def card_document(card: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """The content of a card's file: the card, the digest of the tensors' file, and a checksum of both."""
    document = {**card, _DIGEST: _digest(tensors)}
    return {**document, CHECKSUM: with_checksum(_checked_part(document))[CHECKSUM]}


def load_adaptor(path: str | Path, backbone: Backbone | None = None, device: str = "auto") -> Adaptor:
    """Load an adaptor onto its backbone.

    Args:
        path: the .safetensors file, with its card beside it.
        backbone: the frozen model; by default the one that the card names is loaded.
        device: auto, cpu or cuda.

    Raises:
        UserError: a file is missing or damaged, or the backbone is not the one the adaptor was trained on.

    Example:
        >>> import glob
        >>> import torch
        >>> import sidecache as sc
        >>> path = sorted(glob.glob("runs/digits/adaptors/losa-*.safetensors"))[0]
        >>> adaptor = sc.load_adaptor(path, device="cpu")
        >>> images = torch.zeros(2, *adaptor.forward.backbone.image_size)  # preprocessed
        >>> adaptor.probabilities(images).shape
        torch.Size([2, 10])
    """
    configure_process()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no adaptor {path}; give a .safetensors file that a run wrote below its adaptors/")
    card = _read_card(path)
    backbone = backbone or load_backbone(_expanded(card.backbone), card.clips)
    _require_backbone_of(path, card, backbone)
    forward = FrozenForward(backbone, card.layers, card.tokens, ExtractConfig(device=device, precision=card.precision))
    model = _build_model(path, card, backbone)
    _load_tensors(path, model)
    return Adaptor(card, model.to(forward.device).eval(), forward)


def _require_backbone_of(path: Path, card: Card, backbone: Backbone) -> None:
    for name, found in digests(backbone).items():
        if found != (expected := getattr(card, name)):
            raise UserError(
                f"{path} was trained on another backbone: {name} is {expected}, here it is {found}; "
                f"give the backbone it was trained on ({card.backbone.name or card.backbone.weights})"
            )


def _expanded(config: BackboneConfig) -> BackboneConfig:
    """Replace `${VARIABLE}` in the path of the weights, but never in a name that is sent to a hub."""
    if config.weights.startswith("hf-hub:"):
        return config
    return config.model_copy(update={"weights": expand_text(config.weights)})


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
        raise UserError(f"{path.with_suffix('.json')}, the card of an adaptor, is damaged: {reason}") from error
    _require_shapes(path, {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(planned).items()}, found)
    model = build_model(card.method, spec, len(card.classes), options, backbone=backbone)
    _allocate_samples(model, found)
    return model


def _allocate_samples(model: nn.Module, found: Shapes) -> None:
    """Make room for as many neighbors as the file holds; models of other methods have none."""
    if isinstance(model, KNN):
        head: Any = model.readout.head
        head.allocate(found.get("readout.head.samples", (0,))[0])


def _read_card(path: Path) -> Card:
    file = path.with_suffix(".json")
    try:
        text = read_text(file, _MOST_CARD_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {file}, the card of an adaptor: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no JSON: {error}; {_REMEDY}") from error
    except ValueError as error:
        raise UserError(f"{file} is no adaptor's card: {error}; {_REMEDY}") from error
    try:
        document = parse_json(text)
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}; {_REMEDY}") from error
    try:
        without_checksum(_checked_part(document))
    except ValueError as error:
        raise UserError(f"{file} is no adaptor's card: {error}; {_REMEDY}") from error
    return _parse_card(path, {name: value for name, value in document.items() if name != CHECKSUM})


def _parse_card(path: Path, document: dict[str, Any]) -> Card:
    file, digest = path.with_suffix(".json"), document.pop(_DIGEST, None)
    try:
        card = Card.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is no adaptor's card: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    with _reading(path):
        found = _digest(path)
    if digest != found:
        raise UserError(f"{path} is not the file of tensors that {file} was written with; {_REMEDY}")
    return card


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _checked_part(document: Any) -> Any:
    """The part of a card that its checksum covers: all but the path of the backbone's weights."""
    backbone = document.get("backbone") if isinstance(document, dict) else None
    if not isinstance(backbone, dict):
        return document
    return {**document, "backbone": {name: value for name, value in backbone.items() if name != "weights"}}


def _shapes(path: Path) -> Shapes:
    """The shapes of all tensors of a file; none is larger than the file, which safetensors checks."""
    with _reading(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _require_shapes(path: Path, wanted: Shapes, found: Shapes) -> None:
    if wanted != found:
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:2]
        raise UserError(f"{path} does not hold the tensors that its card describes: {differing}")


def _load_tensors(path: Path, model: nn.Module) -> None:
    with _reading(path):
        saved = load_file(path)
    for name, tensor in adapter_state_dict(model).items():
        if saved[name].dtype != tensor.dtype or not saved[name].isfinite().all():
            raise UserError(f"{path} is damaged: {name} does not hold finite numbers of type {tensor.dtype}")
    model.load_state_dict(saved, strict=False)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the adaptor {path}: {error}") from error
