"""The card of an adaptor: a JSON file beside its tensors, which says all that is needed to use them.

The card holds a digest of the tensors' file and a checksum of itself, so a file that was damaged, edited or exchanged
is refused. Of the card only `backbone.weights` may be edited, for weights that were moved: their content has its own
digest.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from adapt.run_dir.files import CHECKSUM, parse_json, read_text, with_checksum, without_checksum, write_text
from extract.config import BackboneConfig, ClipConfig
from store.config import Tokens
from store.errors import UserError

_MOST_CARD_BYTES = 16 << 20
_DIGEST = "tensors_digest"  # field of the card on disk: the digest of the tensors' file

_REMEDY = "put back card and tensors as they were written together, or delete both and train again"


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


def card_path(tensors: Path) -> Path:
    """The card of a file of tensors."""
    return tensors.with_suffix(".json")


def card_document(card: dict[str, Any], tensors: Path) -> dict[str, Any]:
    """The content of a card's file: the card, the digest of the tensors' file, and a checksum of both."""
    document = {**card, _DIGEST: _digest(tensors)}
    return {**document, CHECKSUM: with_checksum(_checked_part(document))[CHECKSUM]}


def write_card(tensors: Path, document: dict[str, Any]) -> None:
    """Write what `card_document` gave; raises what `write_text` raises."""
    write_text(card_path(tensors), json.dumps(document, indent=1, ensure_ascii=False))


def read_card(tensors: Path) -> Card:
    """Read the card of a file of tensors.

    Raises:
        UserError: a file is missing or damaged, or both were not written together.
    """
    if not tensors.is_file():
        raise UserError(f"there is no adaptor {tensors}; give a .safetensors file that a run wrote below its adaptors/")
    file = card_path(tensors)
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
    return _parse_card(tensors, {name: value for name, value in document.items() if name != CHECKSUM})


@contextmanager
def reading(tensors: Path) -> Iterator[None]:
    """Turn errors of reading a file of tensors into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the adaptor {tensors}: {error}") from error


def _parse_card(tensors: Path, document: dict[str, Any]) -> Card:
    file, digest = card_path(tensors), document.pop(_DIGEST, None)
    try:
        card = Card.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is no adaptor's card: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    with reading(tensors):
        found = _digest(tensors)
    if digest != found:
        raise UserError(f"{tensors} is not the file of tensors that {file} was written with; {_REMEDY}")
    return card


def _digest(tensors: Path) -> str:
    with tensors.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _checked_part(document: Any) -> Any:
    """The part of a card that its checksum covers: all but the path of the backbone's weights."""
    backbone = document.get("backbone") if isinstance(document, dict) else None
    if not isinstance(backbone, dict):
        return document
    return {**document, "backbone": {name: value for name, value in backbone.items() if name != "weights"}}
