"""A trained adaptor on new images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from adapt.adaptor import Adaptor
from extract.images import decode_rgb
from store.errors import UserError
from store.groups import in_groups
from store.progress import progress


def predict(adaptor: Adaptor, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Classify image files.

    Returns:
        for every file, in order: `file`, `class`, `probability`, and `probabilities` by class (softmax; sigmoid for
        multi-label adaptors).

    Raises:
        UserError: a file is missing or is no image.
    """
    results: list[dict[str, Any]] = []
    with progress("predicting", len(files), "images") as advance:
        for group in in_groups(files, adaptor.forward.batch_size):
            results.extend(_predict_group(adaptor, group))
            advance(len(group))
    return results


def _predict_group(adaptor: Adaptor, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    images = torch.stack([_load(adaptor, file) for file in files])
    for file, probabilities in zip(files, adaptor.probabilities(images), strict=True):
        best = int(probabilities.argmax())
        yield {
            "file": str(file),
            "class": adaptor.card.classes[best],
            "probability": float(probabilities[best]),
            "probabilities": dict(zip(adaptor.card.classes, probabilities.tolist(), strict=True)),
        }


def _load(adaptor: Adaptor, file: Path) -> torch.Tensor:
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    return torch.as_tensor(adaptor.forward.backbone.transform(decode_rgb(encoded, str(file))))
