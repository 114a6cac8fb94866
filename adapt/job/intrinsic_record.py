"""Reads and writes `intrinsic.json` of a run directory: the last measurement, and every score that it came from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapt.job.intrinsic_dimension import Measurement
from adapt.job.intrinsic_figure import draw
from adapt.job.trial_run import TrialRun
from adapt.run_dir.files import damaged, read_json, write_json, write_text
from adapt.run_dir.results import Row
from store.config import PositiveInt

DIMS = (8, 32, 128, 512)  # measured by default


class _Score(BaseModel):
    """The score of a trial; the extra fields describe the trial to a reader."""

    model_config = ConfigDict(extra="allow", strict=True)

    score: Annotated[float, Field(allow_inf_nan=False)]


class _Last(BaseModel):
    """The last measurement; the extra fields are its outcome."""

    model_config = ConfigDict(extra="allow", strict=True)

    block: Annotated[int, Field(ge=0)]
    dims: Annotated[list[PositiveInt], Field(min_length=1)]


class _Document(BaseModel):
    """The content of `intrinsic.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    features: str | None = None
    measurement: _Last | None = None
    scores: dict[str, _Score] = {}


class IntrinsicRecord:
    """`intrinsic.json` of a run directory.

    Args:
        run_dir: the run directory.
        results: rows of the run, whose validation scores are used too.

    Raises:
        JobError: the file is damaged.
    """

    def __init__(self, run_dir: Path, results: Iterable[Row]) -> None:
        self._file = run_dir / "intrinsic.json"
        self._results = {row.trial_id: row.val_score for row in results if row.val_score is not None}
        self._document = self._read() if self._file.exists() else _Document()

    def last_measured(self, features: str) -> tuple[int | None, tuple[int, ...]]:
        """Block and dimensions of the last measurement.

        Args:
            features: digest of the features; a measurement on other ones is ignored.

        Returns:
            (block, dimensions); where there is no such measurement, None and the default dimensions.
        """
        last = self._document.measurement
        if last is None or self._document.features != features:
            return None, DIMS
        return last.block, tuple(last.dims)

    def find_score(self, trial_id: str) -> float | None:
        """The validation score of a trial; None if it has not been trained."""
        if trial_id in self._results:
            return self._results[trial_id]
        score = self._document.scores.get(trial_id)
        return score.score if score else None

    def add_score(self, run: TrialRun, score: float) -> None:
        """Write the validation score of a trial that was trained."""
        fields = run.spec.trial.model_dump(mode="json", serialize_as_any=True)
        self._document.scores[run.trial_id] = _Score(score=score, method=run.spec.method.name, **fields)
        self._write()

    def save(self, features: str, measurement: Measurement) -> None:
        """Write a measurement on the features with that digest, and its figure `intrinsic.svg`."""
        last = _Last.model_validate(measurement.document())
        self._document = _Document(features=features, measurement=last, scores=self._document.scores)
        self._write()
        write_text(self._file.with_suffix(".svg"), draw(measurement))

    def _read(self) -> _Document:
        try:
            return _Document.model_validate(read_json(self._file))
        except ValidationError as error:
            first = error.errors()[0]
            raise damaged(self._file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def _write(self) -> None:
        write_json(self._file, self._document.model_dump())
