"""Keeps the predictions of a trial on the test split, so that any metric can be computed from them later.

A Parquet file has one row a sample: its id, its label (a class index, or a list of 0 and 1), and its logits as a list
of float32, averaged over the views of the sample. The metadata of its schema are the id of the trial, the names of the
classes and a checksum of all values. It is not compressed: logits hardly shrink, and so a file is never smaller than
the arrays that are read from it.
"""

import hashlib
import json
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, UInt8

from adapt.run_dir.files import write_bytes
from adapt.run_dir.results import Row
from store.errors import UserError

Labels = (
    Int64[np.ndarray, "samples"] | UInt8[np.ndarray, "samples classes"]
)  # class indices, or 0 and 1 for every class
_TRIAL, _CLASSES, _CHECKSUM = b"sidecache.trial_id", b"sidecache.classes", b"sidecache.checksum"
_COLUMNS = ["sample_id", "label", "logits"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of one trial on the test split.

    Args:
        trial_id: the trial.
        classes: names of the classes in order of their index.
        sample_ids: the id of every sample.
        labels: class indices, or multi-label 0 and 1.
        logits: averaged over the views of a sample.

    Raises:
        ValueError: the shapes do not match, there is no sample, or a label is not among the classes.
    """

    trial_id: str
    classes: tuple[str, ...]
    sample_ids: tuple[str, ...]
    labels: Labels
    logits: Float32[np.ndarray, "samples classes"]

    def __post_init__(self) -> None:
        shape = (len(self.sample_ids), len(self.classes))
        if self.logits.shape != shape or self.labels.shape != shape[: self.labels.ndim]:
            raise ValueError(
                f"{shape[0]} samples and {shape[1]} classes do not match logits {self.logits.shape} "
                f"and labels {self.labels.shape}"
            )
        if not shape[0]:
            raise ValueError("there are no samples")
        largest = shape[1] - 1 if self.labels.ndim == 1 else 1
        if self.labels.min() < 0 or self.labels.max() > largest:
            raise ValueError(f"a label is not between 0 and {largest}")

    @cached_property
    def samples_digest(self) -> str:
        """A digest of classes, ids and labels: predictions with equal digests are of the same test split."""
        return str(self._hash().hexdigest())

    @cached_property
    def checksum(self) -> str:
        """A digest of everything."""
        digest = self._hash()
        digest.update(self.trial_id.encode())
        digest.update(np.ascontiguousarray(self.logits).tobytes())
        return str(digest.hexdigest())

    def _hash(self) -> Any:
        names = json.dumps([self.classes, self.sample_ids, self.labels.shape])
        digest = hashlib.blake2b(names.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest


def predictions_path(run_dir: Path, row: Row) -> Path:
    """The file with the predictions of a row's trial."""
    return run_dir / "predictions" / f"{row.file_stem}.parquet"


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions atomically, and make the folder of the file.

    Raises:
        JobError: the file cannot be written; the old one is kept.
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(_to_table(predictions), buffer, compression="none", use_dictionary=False)
    write_bytes(path, memoryview(buffer.getvalue()))


def read_predictions(path: str | Path) -> Predictions:
    """Read the predictions of a trial.

    Raises:
        UserError: there is no such file, or it is not as `write_predictions` has written it.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(_require_regular(path)) as file:
            _require_size(path, file)
            predictions = _from_table(file.read(), dict(file.schema_arrow.metadata or {}))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no predictions at {path}: `sidecache run` writes them for every trial that it trains"
        ) from None
    except OSError as error:
        raise _damaged(path, error.strerror or error) from error
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    return predictions


def find_predictions(run_dir: Path, row: Row) -> Predictions | None:
    """The predictions of a row's trial; None if it was trained before predictions were kept.

    Raises:
        UserError: the file is damaged, or of another trial.
    """
    path = predictions_path(run_dir, row)
    if not path.exists():
        return None
    predictions = read_predictions(path)
    if predictions.trial_id != row.trial_id:
        raise _damaged(path, f"it is of trial {predictions.trial_id}, not {row.trial_id}")
    return predictions


def _to_table(predictions: Predictions) -> pa.Table:
    width, labels = len(predictions.classes), predictions.labels
    columns = [
        pa.array(predictions.sample_ids, pa.string()),
        pa.array(labels) if labels.ndim == 1 else _lists(labels, width),
        _lists(predictions.logits, width),
    ]
    metadata = {
        _TRIAL: predictions.trial_id,
        _CLASSES: json.dumps(predictions.classes),
        _CHECKSUM: predictions.checksum,
    }
    return pa.table(columns, names=_COLUMNS).replace_schema_metadata(metadata)


def _lists(values: np.ndarray, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)


def _require_regular(path: Path) -> Path:
    """Refuse a pipe, which could block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path


def _require_size(path: Path, file: pq.ParquetFile) -> None:
    """Refuse a small file that claims many rows, before memory is allocated for them."""
    n_rows, n_bytes = file.metadata.num_rows, path.stat().st_size
    if 4 * n_rows * _width(file.schema_arrow) > n_bytes:
        raise ValueError(f"it claims {n_rows:,} samples and has only {n_bytes:,} bytes")


def _width(schema: pa.Schema) -> int:
    """The number of classes, of a file that has the right columns."""
    types = dict(zip(schema.names, schema.types, strict=True))
    width = getattr(types.get("logits"), "list_size", 0)
    legal = (pa.int64(), pa.list_(pa.uint8(), width)) if width else ()
    expected = [{"sample_id": pa.string(), "label": label, "logits": pa.list_(pa.float32(), width)} for label in legal]
    if types not in expected:
        raise ValueError(f"it has the columns {schema.to_string(show_schema_metadata=False)[:99]}")
    return int(width)


def _from_table(table: pa.Table, metadata: dict[bytes, bytes]) -> Predictions:
    labels, shape = table["label"], (-1, _width(table.schema))
    predictions = Predictions(
        trial_id=metadata[_TRIAL].decode(),
        classes=tuple(map(str, json.loads(metadata[_CLASSES]))),
        sample_ids=tuple(table["sample_id"].to_pylist()),
        labels=_flat(labels).reshape(shape) if pa.types.is_fixed_size_list(labels.type) else labels.to_numpy(),
        logits=_flat(table["logits"]).reshape(shape),
    )
    if predictions.checksum != metadata[_CHECKSUM].decode():
        raise ValueError("its content does not match its checksum")
    return predictions


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column of lists, one after the other."""
    values: np.ndarray = column.combine_chunks().flatten().to_numpy()
    return values


def _damaged(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split())[:200]
    return UserError(
        f"{path} is damaged ({text}): delete it, and tables show no interval for its trial; delete the row of results "
        "too, and `sidecache run` trains the trial again"
    )
