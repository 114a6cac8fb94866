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

import numpy as np
from PIL import Image

from adapt.config.load_config import load_config
from adapt.run_dir.config_file import read_config
from adapt.run_dir.predictions import Predictions
from extract.sources.open_source import ImageSource, open_source
from store.address import store_url
from store.errors import UserError
from store.growing.growth import read_known
from store.kvstore import KeyValueStore

_SIDE = 96  # pixels
_QUALITY = 70


def wants_pictures(run_dir: Path) -> bool:
    """Whether the configuration of a run allows pictures in its report.

    Raises:
        UserError: it has no configuration that can be read.
    """
    text, _ = read_config(run_dir)
    if text is None:
        raise UserError(f"{run_dir} has no config.yaml, which names the samples")
    return load_config(run_dir / "config.yaml").report.pictures


def pictures(run_dir: Path, trial: Predictions, numbers: Sequence[int]) -> list[str]:
    """Pictures of samples as `data:` URLs of JPEGs; of a video, its first frame.

    Args:
        run_dir: where the trial was trained.
        trial: its predictions.
        numbers: of the samples, among those of the trial.

    Raises:
        UserError: the samples are gone or damaged, or others are there now.
        JobError: they cannot be read, or the store that knows the test split cannot.
    """
    config = load_config(run_dir / "config.yaml")
    with _silent():
        source = open_source(config.data, read_known(KeyValueStore(store_url(config.store.path))))
        rows, split = _rows_of(source, trial), source.splits["test"]
        return [_thumbnail(split[rows[number]]) for number in numbers]


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what listing the samples warns of, since the job has shown it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rows_of(source: ImageSource, trial: Predictions) -> list[int]:
    """The row of every sample of a trial in the test split; of a video, that of its first view."""
    split = source.splits["test"]
    ids = [sample.encode(errors="backslashreplace").decode() for sample in split.ids[:: source.views]]
    row_of = {sample.removesuffix("#0") if source.views > 1 else sample: k for k, sample in enumerate(ids)}
    rows = [row_of[sample] * source.views for sample in trial.sample_ids if sample in row_of]
    if len(rows) < len(trial.sample_ids) or source.classes != trial.classes:
        raise UserError("the configuration of the run names other samples now than those that were tested")
    if not np.array_equal(split.labels[rows], trial.labels):
        raise UserError("the samples have other labels now than when they were tested")
    return rows


def _thumbnail(sample: Image.Image | Sequence[Image.Image]) -> str:
    image = sample if isinstance(sample, Image.Image) else sample[0]
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
