"""Writes scalars of every trial for TensorBoard, one folder a trial."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from adapt.run_dir.results import Row
from adapt.training.callbacks import EpochEvent

_METRICS = ("top1", "top5", "mean_class_accuracy", "macro_f1", "mean_average_precision")
_MOST_OPEN = 200  # event files; many systems allow 1,024 open files a process


class TensorBoardCallback:
    """A callback that writes event files to `run_dir/tensorboard/METHOD-seedS-ID`.

    The ID is a digest of options, learning rate and weight decay: all epochs of a trial are in one folder, those of the
    search with tags such as `search/train_loss`, those of the training of the chosen trial as `final/train_loss`, and
    its test metrics as `test/top1`.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writers: OrderedDict[str, SummaryWriter] = OrderedDict()  # by folder; the last used one is the last

    def on_epoch(self, event: EpochEvent) -> None:
        """Write losses, score and learning rate of an epoch."""
        options, lr, weight_decay = event.options, event.lr, event.weight_decay
        scalars = {
            "train_loss": event.train_loss,
            "val_score": event.val_score,
            "val_loss": event.val_loss,
            "learning_rate": event.last_lr,
        }
        name = _folder_name(event.method, event.seed, [options, lr, weight_decay])
        self._write(name, {f"{event.phase}/{tag}": value for tag, value in scalars.items()}, event.epoch)

    def on_trial(self, row: Row) -> None:
        """Write the test metrics of a trial, at its best epoch, and close its file."""
        name = _folder_name(row.method, row.seed, [row.options, row.lr, row.weight_decay])
        self._write(name, {f"test/{metric}": getattr(row, metric) for metric in _METRICS}, row.best_epoch)
        self._writers.pop(name).close()

    def close(self) -> None:
        """Close all files; everything was written before."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _write(self, name: str, scalars: dict[str, float | None], step: int) -> None:
        writer = self._writer(name)
        for tag, value in scalars.items():
            if value is not None:
                writer.add_scalar(tag, value, step)
        writer.flush()  # a job that is killed leaves what it has done

    def _writer(self, name: str) -> SummaryWriter:
        """The writer of a folder; if too many are open, the one that was not used for longest is closed."""
        if name not in self._writers:
            if len(self._writers) >= _MOST_OPEN:
                self._writers.popitem(last=False)[1].close()
            self._writers[name] = SummaryWriter(str(self._folder / name))
        self._writers.move_to_end(name)
        return self._writers[name]


def _folder_name(method: str, seed: int, settings: list[Any]) -> str:
    identity = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{method}-seed{seed}-{identity}"
