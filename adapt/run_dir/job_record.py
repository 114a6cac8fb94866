"""Keeps when, how and on what the trials of a run directory were trained, in its `job.json`: of the last such job."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from adapt.run_dir.files import damaged, read_json, write_json

_NAME = "job.json"


class JobRecord(BaseModel):
    """A job that trained trials.

    Args:
        date: when it started to train them, in UTC, as `2026-12-01 09:30`.
        command: as it was given.
        processor: name of the processor.
        cores: that the job could use.
        gpu: name of the GPU that trained; None without one. With workers, that of the process that led them.
        versions: of Python and of the packages that decide results, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    date: str
    command: str
    processor: str
    cores: int
    gpu: str | None
    versions: dict[str, str]


def write_job_record(run_dir: Path, record: JobRecord) -> None:
    """Replace the record of a run directory.

    Raises:
        JobError: the file cannot be written.
    """
    write_json(run_dir / _NAME, record.model_dump())


def read_job_record(run_dir: Path) -> JobRecord | None:
    """The record of a run directory; None if it has none.

    Raises:
        JobError: the file is damaged.
    """
    path = run_dir / _NAME
    if not path.exists():
        return None
    try:
        return JobRecord.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
