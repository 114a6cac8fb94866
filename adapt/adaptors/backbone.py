"""Loads the backbone of an adaptor, with its weights where they are now: runs and weights are moved."""

from collections.abc import Iterator
from pathlib import Path

from adapt.adaptors.card import Card
from adapt.config.variables import expand_text
from extract.backbones.backbone import Backbone, ModelBackbone, digests, load_backbone
from extract.backbones.hub_cache import cached_weights
from extract.config import BackboneConfig
from store.errors import UserError

_WITHOUT_FILE = ("pretrained", "random")


def load_backbone_of(tensors: Path, card: Card, weights: str | Path | None = None) -> ModelBackbone:
    """Load the backbone that a card names.

    Args:
        tensors: the file of the adaptor.
        card: its card.
        weights: those of the backbone; by default where the card says, else beside the adaptor, in its run directory or
            in the cache of the model hub, if these are the same weights.

    Raises:
        UserError: there are no such weights.
    """
    if weights is not None:
        return load_backbone(_with_weights(card.backbone, weights), card.clips)
    config = _expanded(card.backbone)
    if _is_there(config.weights):
        return load_backbone(config, card.clips)
    refused = []
    for path in _other_places(tensors, config):
        backbone = _load_if_same(card, path)
        if backbone:
            return backbone
        refused.append(str(path))
    raise UserError(
        f"backbone.weights {config.weights!r}: there is no such file or folder, and the same weights are neither "
        f"beside {tensors}, nor in its run directory, nor in the cache of the model hub"
        + (f" (of another content: {', '.join(refused)})" if refused else "")
        + "; give their path: --weights FILE, from Python weights=FILE"
    )


def require_backbone_of(tensors: Path, card: Card, backbone: Backbone) -> None:
    """Check that a backbone is the one that an adaptor was trained on.

    Raises:
        UserError: it has other weights, or another preprocessing.
    """
    for name, found in digests(backbone).items():
        if found != (expected := getattr(card, name)):
            raise UserError(
                f"{tensors} was trained on another backbone: {name} is {expected}, here it is {found}; "
                f"give the backbone it was trained on ({card.backbone.name or card.backbone.weights}), or its weights: "
                "--weights FILE, from Python weights=FILE"
            )


def _with_weights(config: BackboneConfig, weights: str | Path) -> BackboneConfig:
    return config.model_copy(update={"weights": str(weights)})


def _expanded(config: BackboneConfig) -> BackboneConfig:
    """Replace `${VARIABLE}` in the path of the weights, but never in a name that is sent to a hub."""
    if config.weights.startswith("hf-hub:"):
        return config
    return _with_weights(config, expand_text(config.weights))


def _is_there(weights: str) -> bool:
    return weights.startswith("hf-hub:") or weights in _WITHOUT_FILE or Path(weights).exists()


def _other_places(tensors: Path, config: BackboneConfig) -> Iterator[Path]:
    """Files and folders that may hold the weights of a path that is gone."""
    name, folder = Path(config.weights).name, tensors.absolute().parent
    folders = [folder, folder.parent] if folder.name == "adaptors" else [folder]
    yield from (place / name for place in folders if name and (place / name).exists())
    if config.name:
        yield from cached_weights(config.name)


def _load_if_same(card: Card, weights: Path) -> ModelBackbone | None:
    """The backbone of a card with these weights; None if they are others."""
    try:
        backbone = load_backbone(_with_weights(card.backbone, weights), card.clips)
    except UserError:  # no weights of this model
        return None
    expected = {"weights_digest": card.weights_digest, "preprocessing_digest": card.preprocessing_digest}
    return backbone if digests(backbone) == expected else None
