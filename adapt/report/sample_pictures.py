"""Makes small pictures of the samples that a trial was tested on.

The samples are listed again from the configuration in the run directory. They are shown only if their ids, labels and
classes are those of the predictions, so that a picture is never that of another sample.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from adapt.run_dir.config_file import read_config
from adapt.run_dir.predictions import Predictions
from extract.sources.open_source import ImageSource, open_source
from store.errors import UserError

_SIDE = 96  # pixels
_QUALITY = 70


def config_of(run_dir: Path) -> Config:
    """The configuration of a run, which names its samples and says whether the report shows them.

    Raises:
        UserError: it has no configuration that can be read.
    """
    text, _ = read_config(run_dir)
    if text is None:
        raise UserError(f"{run_dir} has no config.yaml, which names the samples")
    return load_config(run_dir / "config.yaml")


def pictures(config: Config, trial: Predictions, numbers: Sequence[int]) -> list[str]:
    """Pictures of samples as `data:` URLs of JPEGs; of a video, its first frame.

    Args:
        config: of the job that trained the trial.
        trial: its predictions.
        numbers: of the samples, among those of the trial.

    Raises:
        UserError: the samples are gone or damaged, or others are there now.
        JobError: they cannot be read.
    """
    with _silent():
        source = open_source(config.data)
        places = _places_of(source, trial)
        return [_thumbnail(source.splits[places[k].split][places[k].row]) for k in numbers]


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what listing the samples warns of, since the job has shown it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Place(NamedTuple):
    """Where a sample is in a source; of a video, its first view."""

    split: str
    row: int


def _places_of(source: ImageSource, trial: Predictions) -> list[_Place]:
    """The place of every sample of a trial.

    If the test split is drawn, it may be another one than the store kept as it grew: the ids tell.
    """
    place_of = {
        _id_of(sample, source.views): _Place(split, row * source.views)
        for split in (("train", "test") if source.drawn else ("test",))
        for row, sample in enumerate(source.splits[split].ids[:: source.views])
    }
    places = [place_of[sample] for sample in trial.sample_ids if sample in place_of]
    if len(places) < len(trial.sample_ids) or source.classes != trial.classes:
        raise UserError("the configuration of the run names other samples now than those that were tested")
    labels = [source.splits[place.split].labels[place.row] for place in places]
    if not np.array_equal(labels, trial.labels):
        raise UserError("the samples have other labels now than when they were tested")
    return places


def _id_of(sample: str, views: int) -> str:
    """The id of a sample as predictions have it."""
    text = sample.encode(errors="backslashreplace").decode()
    return text.removesuffix("#0") if views > 1 else text


def _thumbnail(sample: Image.Image | Sequence[Image.Image]) -> str:
    image = sample if isinstance(sample, Image.Image) else sample[0]
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
