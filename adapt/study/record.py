"""Keeps what became of every part of a study in `study.json` of its run directory."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapt.config.study import Part, Study
from adapt.run_dir.files import damaged, read_json, write_json

_NAME = "study.json"


class PartRecord(BaseModel):
    """What became of a part.

    Attributes:
        name: of the part, which is its folder below the run directory of the study.
        reason: why it failed; empty unless it did.
        seconds: that were spent on it, by all runs of the study.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    dataset: str | None
    backbone: str | None
    status: Literal["done", "failed", "not started"] = "not started"
    reason: str = ""
    seconds: Annotated[float, Field(ge=0.0)] = 0.0


class StudyRecord(BaseModel):
    """The last run of a study, and what became of its parts.

    Attributes:
        name: of the study.
        command: run, extract or train.
        study: the configuration as the user wrote it.
        parts: in the order of the study.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    command: Literal["run", "extract", "train"]
    study: dict[str, Any]
    parts: tuple[PartRecord, ...]

    @property
    def failed(self) -> tuple[PartRecord, ...]:
        """The parts that failed."""
        return tuple(part for part in self.parts if part.status == "failed")

    def with_part(self, part: PartRecord) -> "StudyRecord":
        """A copy in which a part of the same name is replaced."""
        parts = tuple(part if old.name == part.name else old for old in self.parts)
        return self.model_copy(update={"parts": parts})


def new_record(study: Study, command: Literal["run", "extract", "train"]) -> StudyRecord:
    """The record of a study that begins; seconds of earlier runs are kept.

    Raises:
        JobError: the record of an earlier run is damaged.
    """
    earlier = read_record(study.run_dir) if has_record(study.run_dir) else None
    seconds = {part.name: part.seconds for part in earlier.parts} if earlier else {}
    parts = tuple(_new_part(part, seconds.get(part.name, 0.0)) for part in study.parts)
    return StudyRecord(name=study.name, command=command, study=dict(study.as_written), parts=parts)


def _new_part(part: Part, seconds: float) -> PartRecord:
    return PartRecord(name=part.name, dataset=part.dataset, backbone=part.backbone, seconds=seconds)


def has_record(run_dir: Path) -> bool:
    """Whether a run directory is that of a study."""
    return (run_dir / _NAME).exists()


def write_record(run_dir: Path, record: StudyRecord) -> None:
    """Replace the record of a study.

    Raises:
        JobError: the file cannot be written; the old one is kept.
    """
    write_json(run_dir / _NAME, record.model_dump(mode="json"))


def read_record(run_dir: Path) -> StudyRecord:
    """Read the record of a study.

    Raises:
        JobError: the file cannot be read, or was changed.
    """
    path = run_dir / _NAME
    document = read_json(path)
    try:
        return StudyRecord.model_validate(document | {"parts": tuple(document.get("parts", ()))})
    except (ValidationError, TypeError) as error:
        raise damaged(path, "it is not the record of a study") from error
