"""Classifies new images or videos with a trained adaptor."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from adapt.adaptor import Adaptor
from adapt.training.metrics import average_views
from extract.forward.frozen_forward import preprocess
from extract.images.decode import decode_rgb
from extract.sources.samples import Sample
from extract.sources.videos import Video, expand_views
from store.console.progress import progress
from store.errors import UserError
from store.layout import in_groups


def predict(adaptor: Adaptor, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Classify files: images, or videos by the mean logits of their views if the adaptor was trained on clips.

    Args:
        adaptor: the trained model.
        files: in any order.

    Returns:
        for every file, in order: `file`, `class`, `probability`, and `probabilities` by class (softmax; sigmoid for
        multi-label adaptors).

    Raises:
        UserError: a file cannot be read, or is no image or video.
    """
    results: list[dict[str, Any]] = []
    with progress("predicting", len(files), "images") as advance:
        for group in in_groups(files, adaptor.forward.batch_size(len(files))):
            results.extend(_predict_group(adaptor, group))
            advance(len(group))
    return results


def _predict_group(adaptor: Adaptor, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    views = [view for file in files for view in _load(adaptor, file)]
    logits = average_views(adaptor.logits(torch.stack(views)), len(views) // len(files))
    for file, probabilities in zip(files, adaptor.classify(logits), strict=True):
        best = int(probabilities.argmax())
        yield {
            "file": str(file),
            "class": adaptor.card.classes[best],
            "probability": float(probabilities[best]),
            "probabilities": dict(zip(adaptor.card.classes, probabilities.tolist(), strict=True)),
        }


def _load(adaptor: Adaptor, file: Path) -> list[torch.Tensor]:
    """The preprocessed views of a file; an image has one."""
    transform, clips = adaptor.forward.backbone.transform, adaptor.card.clips
    if clips:
        video = Sample(str(_require_readable(file)), (), Video(str(file), clips))
        views = expand_views([video], clips.views)
        return [preprocess(transform, view.content.decode(view.id), view.id) for view in views]
    return [preprocess(transform, decode_rgb(_require_readable(file).read_bytes(), str(file)), str(file))]


def _require_readable(file: Path) -> Path:
    try:
        with file.open("rb"):
            return file
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
