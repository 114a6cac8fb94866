"""Trained adaptors on disk: safetensors of the trained tensors, with a JSON card beside them.

Neither is trusted. The card names the backbone, as a configuration does: what it names is loaded (a local file, or
weights of the model hub), unless the caller gives the backbone.
"""

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

from adapt.explain import explain
from adapt.features import spec_of_backbone
from adapt.methods import build_model, find_method, learned_tensors
from adapt.run_files import write_text
from extract.backbone import Backbone, digests, load_backbone
from extract.config import BackboneConfig, ClipConfig, ExtractConfig
from extract.forward import FrozenForward
from extract.transfer import autocast
from extract.weights import first_line
from store.config import Section, Tokens
from store.durable import replacing
from store.errors import JobError, UserError
from store.layout import resolve_layers

_MOST_CARD_BYTES = 16 << 20

Shapes = dict[str, tuple[int, ...]]


class Facts(BaseModel):
    """What an adaptor must know of the features that it was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: BackboneConfig
    clips: ClipConfig | None = None  # how frames were drawn from videos
    weights_digest: str
    preprocessing_digest: str
    precision: Literal["float32", "bfloat16", "float16"]  # of the frozen forward
    layers: tuple[int, ...]
    tokens: Tokens
    classes: tuple[str, ...]
    multi_label: bool


class Card(Facts):
    """What an adaptor needs to be used again, and how good it was."""

    method: str
    options: dict[str, Any]
    metrics: dict[str, float | None]
    train_precision: Literal["float32", "bfloat16"] | None = None  # None: the card is older than this entry


@dataclass(frozen=True)
class Adaptor:
    """A trained model with the frozen forward that feeds it."""

    card: Card
    model: nn.Module
    forward: FrozenForward

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, channels, height, width) or clips -> (batch, classes), on the CPU; see `classify`."""
        return self.classify(self.logits(images))

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, channels, height, width) or clips (batch, frames, channels, ...) -> (batch, classes)."""
        of_features = find_method(self.card.method).needs == "features"
        inputs = self.forward(images) if of_features else images.to(self.forward.device)
        before = "float32" if of_features else self.card.precision  # of cards that do not say
        with autocast(self.forward.device, self.card.train_precision or before):
            logits: torch.Tensor = self.model(inputs)
        return logits.float().cpu()

    def classify(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (batch, classes): softmax, or sigmoid for multi-label."""
        return logits.sigmoid() if self.card.multi_label else logits.softmax(dim=1)


def save_adaptor(path: Path, model: nn.Module, card: Card) -> None:
    """Write `path` (.safetensors) and its card (.json beside it).

    Raises:
        JobError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned_tensors(model).items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial)
    except (OSError, SafetensorError) as error:
        raise JobError(f"{path} cannot be written ({error})") from error
    write_text(path.with_suffix(".json"), card.model_dump_json(indent=1))


def load_adaptor(path: str | Path, backbone: Backbone | None = None, device: str = "auto") -> Adaptor:
    """Load an adaptor onto its backbone.

    Args:
        path: the .safetensors file; its card must lie beside it.
        backbone: by default the one the card names is loaded.

    Raises:
        UserError: a file is missing or damaged, or the backbone is not the one the adaptor was trained on.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no adaptor {path}; give a .safetensors file that a run wrote below its adaptors/")
    card = _read_card(path)
    backbone = backbone or load_backbone(card.backbone, card.clips)
    found = digests(backbone)
    for name, expected in (
        ("weights_digest", card.weights_digest),
        ("preprocessing_digest", card.preprocessing_digest),
    ):
        if found[name] != expected:
            raise UserError(
                f"{path} was trained on another backbone: {name} is {expected}, here it is {found[name]}; "
                f"give the backbone it was trained on ({card.backbone.name or card.backbone.weights})"
            )
    forward = FrozenForward(backbone, card.layers, card.tokens, ExtractConfig(device=device, precision=card.precision))
    model = _build_model(path, card, backbone)
    _load_tensors(path, model)
    return Adaptor(card, model.to(forward.device).eval(), forward)


def _build_model(path: Path, card: Card, backbone: Backbone) -> nn.Module:
    kind: type[Section] = find_method(card.method).options
    try:
        resolve_layers(list(card.layers), backbone.depth)
        options = kind.model_validate(card.options)
        spec = spec_of_backbone(backbone, card.layers, card.tokens)
        with torch.device("meta"):  # shapes alone, before a card may claim memory
            planned = build_model(card.method, spec, len(card.classes), options, backbone)
    except (ValidationError, UserError, RuntimeError, MemoryError) as error:  # torch's own for too many values
        reason = explain(error, kind) if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"{path.with_suffix('.json')}, the card of an adaptor, is damaged: {reason}") from error
    _require_shapes(path, {name: tuple(tensor.shape) for name, tensor in learned_tensors(planned).items()})
    return build_model(card.method, spec, len(card.classes), options, backbone)


def _read_card(path: Path) -> Card:
    file = path.with_suffix(".json")
    try:
        if file.stat().st_size > _MOST_CARD_BYTES:
            raise UserError(f"{file} is no adaptor's card: it is larger than {_MOST_CARD_BYTES >> 20} MiB")
        return Card.model_validate(json.loads(file.read_text(encoding="utf-8")), strict=False)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {file}, the card of an adaptor: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is no adaptor's card: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error


def _require_shapes(path: Path, wanted: Shapes) -> None:
    with _reading(path), safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if wanted != found:
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:2]
        raise UserError(f"{path} does not hold the tensors that its card describes: {differing}")


def _load_tensors(path: Path, model: nn.Module) -> None:
    with _reading(path):
        saved = load_file(path)
    for name, tensor in learned_tensors(model).items():
        if saved[name].dtype != tensor.dtype or not saved[name].isfinite().all():
            raise UserError(f"{path} is damaged: {name} does not hold finite numbers of type {tensor.dtype}")
    model.load_state_dict(saved, strict=False)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the adaptor {path}: {error}") from error
