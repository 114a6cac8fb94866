"""Keeps the learning curve of every trial that is trained in steps, in `curves/METHOD-seedS-ID.json`.

Trials of a search have curves too: a trial that is trained on validation rows in the end has no validation score then.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adapt.run_dir.files import damaged, read_json, write_json
from adapt.run_dir.results import Row


class Curve(BaseModel):
    """The epochs of a trial; None where a value is undefined or not finite.

    Args:
        trial_id: the trial.
        train_loss: mean over the batches of each epoch.
        val_score: on the validation rows after each epoch, in percent.
        val_loss: on the validation rows after each epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    trial_id: str
    method: str
    options: dict[str, Any]
    lr: float | None
    weight_decay: float
    seed: int
    train_loss: list[float | None]
    val_score: list[float | None]
    val_loss: list[float | None]

    @property
    def is_validated(self) -> bool:
        """Whether it has validation scores."""
        return any(score is not None for score in self.val_score)

    def is_of(self, row: Row) -> bool:
        """Whether it has the method and hyperparameters of a row."""
        mine = (self.method, self.options, self.lr, self.weight_decay)
        return mine == (row.method, row.options, row.lr, row.weight_decay)


def write_curve(run_dir: Path, curve: Curve) -> None:
    """Write a curve atomically, and make its folder.

    Raises:
        JobError: the file cannot be written.
    """
    write_json(run_dir / "curves" / f"{curve.method}-seed{curve.seed}-{curve.trial_id[:8]}.json", curve.model_dump())


def find_curve(run_dir: Path, row: Row) -> Curve | None:
    """The curve of a row's trial; None if it has none.

    Raises:
        JobError: the file is damaged.
    """
    path = run_dir / "curves" / f"{row.file_stem}.json"
    return _read(path) if path.exists() else None


def find_validated(run_dir: Path, row: Row) -> Curve | None:
    """The curve from whose validation scores a row's trial was chosen; None if there is none.

    Raises:
        JobError: a file is damaged.
    """
    found = [_read(path) for path in sorted((run_dir / "curves").glob(f"{row.method}-seed*.json"))]
    return next((curve for curve in found if curve.is_of(row) and row.val_score in curve.val_score), None)


def _read(path: Path) -> Curve:
    try:
        return Curve.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
