"""What `sidecache verify` does: reads every byte of a store and lists all that is damaged.

Nothing on the disk goes unchecked. Chunks and shard indices carry crc32c; `shard_digest` says which values belong to
which shard and layer; arrays in one chunk are bound to their names by a digest, and every zarr.json to its own content
by a checksum. A changed byte goes unreported only where a document still reads the same: white space between its
fields, or the case of a letter in an escape such as \\u00e9. Memory: one shard of one layer.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import UInt8, UInt32

from store.address import store_url
from store.arrays import (
    DIGEST,
    LOG,
    MISSING,
    SKIPPED,
    STATUS,
    STORED,
    is_log,
    layer_arrays,
    layer_digest,
    layer_name,
    open_schema,
    refuse_half_grown,
    shard_arrays,
    shard_file,
)
from store.console.progress import progress
from store.console.terminal import Terminal
from store.console.visible import one_line
from store.dtypes import Encoded
from store.errors import JobError, UserError
from store.growing.added_layers import names_of_added
from store.io_errors import AccessError, OutageError
from store.kvstore import LOCK, KeyValueStore, wait
from store.lock import read_owner
from store.schema import Schema

_WHOLE_ARRAY = re.compile(r"(.+)/(zarr\.json|c(/0)*)")


@dataclass(frozen=True)
class Damage:
    """A committed shard that cannot be relied on: in one layer, or in all of them where `layer` is None."""

    split: str
    layer: int | None
    shard: int
    rows: tuple[int, int]  # the first, and one past the last
    file: str
    reason: str


@dataclass
class Report:
    """What was found.

    Attributes:
        complete: every shard is committed.
        bytes_read: of values and documents, before compression.
        damaged: what extracting these shards anew mends.
        faults: damage of all else: metadata, labels, ids.
        notes: what is odd and harms nothing.
    """

    store: str
    complete: bool = False
    bytes_read: int = 0
    damaged: list[Damage] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged; an incomplete store may well be sound."""
        return not self.damaged and not self.faults

    def document(self) -> dict[str, Any]:
        """As one JSON document."""
        fields = asdict(self)
        damaged = [{**damage, "rows": list(damage["rows"])} for damage in fields["damaged"]]
        return {"store": self.store, "ok": self.ok, **fields, "damaged": damaged}


def verify_store(path: str | Path) -> Report:
    """Read all of a store and report everything that is wrong with it.

    Raises:
        JobError: there is nothing at all, or it cannot be reached; or its growth was interrupted.
        UserError: the path is empty.
    """
    folder = KeyValueStore(store_url(path))
    keys = folder.keys()
    if not keys:
        raise JobError(f"there is no store at {folder.place}; make one with `sidecache extract`")
    irregular = {fault.path.removeprefix(folder.place): str(fault) for fault in folder.irregular()}
    report = Report(folder.place, faults=[*irregular.values()])
    _attempt(report, refuse_half_grown, folder) if irregular else refuse_half_grown(folder)
    for key in keys:
        if key.rpartition("/")[2] == "zarr.json" and key != f"{LOCK}/zarr.json":
            _attempt(report, folder.read_node, key.removesuffix("zarr.json").rstrip("/"))
            report.bytes_read += len(_attempt(report, folder.read_bytes, key) or b"")
    schema = _attempt(report, open_schema, folder)
    if schema:
        _Check(folder, schema, set(keys), report, irregular.keys()).everything()
    elif not report.faults:
        report.faults.append(f"{folder.place}zarr.json is missing: without it this is no store; extract it anew")
    return report


def damaged_shards(report: Report) -> dict[str, list[int]]:
    """Split -> its damaged shards: what `StoreWriter.unmark` takes."""
    splits = sorted({damage.split for damage in report.damaged})
    return {name: sorted({damage.shard for damage in report.damaged if damage.split == name}) for name in splits}


def print_report(report: Report) -> None:
    """The report on standard output, a line for every finding."""
    lines = [
        f"damaged: shard {damage.shard} of {damage.split} (rows {damage.rows[0]} to {damage.rows[1] - 1}), "
        f"{'all layers' if damage.layer is None else f'layer {damage.layer}'}: {damage.file}: {damage.reason}"
        for damage in report.damaged
    ]
    lines += [f"fault: {text}" for text in report.faults] + [f"note: {text}" for text in report.notes]
    findings = "sound" if report.ok else f"{len(report.damaged)} damaged files, {len(report.faults)} faults"
    state = "complete" if report.complete else "incomplete, `sidecache extract` finishes it"
    lines.append(f"{report.store}: {findings}; {state}; {report.bytes_read:,} bytes read")
    console = Terminal(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(one_line(line), style="red" if line.startswith(("damaged:", "fault:")) else None)


def _attempt(report: Report, call: Callable[..., Any], *given: Any) -> Any:
    """What the call returns; where it fails None, and a fault, which is listed once."""
    try:
        return call(*given)
    except OutageError:
        raise
    except (JobError, UserError) as error:
        if str(error) not in report.faults:
            report.faults.append(str(error))
        return None


class _Check:
    """The checks of a store that can say what it holds."""

    def __init__(
        self, folder: KeyValueStore, schema: Schema, keys: Collection[str], report: Report, irregular: Collection[str]
    ) -> None:
        self._folder, self._schema, self._report = folder, schema, report
        self._keys, self._known = keys, {"zarr.json", *irregular}
        self._whole_arrays: set[str] = set()

    def everything(self) -> None:
        schema, layers = self._schema, len(self._schema.layers)
        self._report.complete = True
        for name in (*schema.splits, "rms", "tail", LOG):
            self._group(name)
        for layer in schema.layers if schema.dtype == "int8" else ():
            rms = self._whole(f"rms/{layer_name(layer)}", "float32", (schema.dim,))
            if rms is not None and not (rms > 0).all():
                self._fault(f"rms/{layer_name(layer)}", "has values that are not positive")
        for name in schema.tail_tensors:
            self._whole(f"tail/{name}", "float32")
        total = layers * sum(len(schema.shards(split)) for split in schema.splits)
        with progress("verifying", total, "shards") as advance:
            for split in schema.splits:
                self._samples(split)
                for _ in self._shards(split):
                    advance(layers)
        self._strays()

    def _group(self, name: str) -> None:
        self._known.add(f"{name}/zarr.json")
        attributes = _attempt(self._report, self._folder.read_group, name)
        if f"{name}/zarr.json" not in self._keys:
            self._fault(f"{name}/zarr.json", "is missing")
        elif attributes is not None and (is_log(attributes) if name == LOG else not attributes) is False:
            self._fault(f"{name}/zarr.json", "is another group's")

    def _samples(self, split: str) -> None:
        """Labels, ids and digests."""
        n, classes = self._schema.splits[split].num_samples, len(self._schema.classes)
        multi_label = self._schema.multi_label
        dtype, shape, legal = ("uint8", (n, classes), 2) if multi_label else ("int64", (n,), classes)
        labels = self._whole(f"{split}/label", dtype, shape)
        if labels is not None and labels.size and not 0 <= labels.min() <= labels.max() < legal:
            self._fault(f"{split}/label", f"has labels from {labels.min()} to {labels.max()}; legal: 0 to {legal - 1}")
        self._whole(f"{split}/sample_digest", "uint8", (n, 16))
        self._whole_arrays.add(f"{split}/sample_id")
        ids = _attempt(self._report, self._folder.read_strings, f"{split}/sample_id")
        if ids is not None and len(ids) != n:
            self._fault(f"{split}/sample_id", f"has {len(ids)} ids for {n} samples")
        self._report.bytes_read += sum(len(text.encode()) for text in ids or ())
        if twice := [repr(text) for text, times in Counter(ids or ()).items() if times > 1]:
            self._fault(f"{split}/sample_id", f"has {len(twice)} ids more than once, such as {twice[0]}")

    def _whole(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        """An array in one chunk; None where it is at fault."""
        self._whole_arrays.add(name)
        values: np.ndarray | None = _attempt(self._report, self._folder.read_array, name)
        if values is None:
            return None
        self._report.bytes_read += values.nbytes
        if values.dtype != dtype or shape not in (None, values.shape):
            self._fault(name, f"holds {values.dtype} {values.shape}; should be {dtype} {shape or ''}")
            return None
        return values

    def _shards(self, split: str) -> Iterable[int]:
        """Checks one after the other as they are asked for."""
        arrays = {}
        for name, metadata in shard_arrays(self._schema, split).items():
            # Only a mark may be missing, and then says as much.
            given = (f"{split}/{name}", metadata, name == STATUS)
            arrays[name] = _attempt(self._report, self._folder.open_array, *given)
            self._known.add(f"{split}/{name}/zarr.json")
        self._report.complete &= arrays[STATUS] is not None
        for shard in self._schema.shards(split):
            files = {name: self._file(split, name, shard) for name in arrays}
            self._known.update(files.values())
            if arrays[STATUS] is not None:
                self._shard(_Shard(split, shard, arrays), {files[name] for name in arrays if name != STATUS})
            yield shard

    def _shard(self, shard: "_Shard", files: Collection[str]) -> None:
        status = self._read(shard, STATUS)
        if status is None:
            return
        if (status == MISSING).all():
            self._report.complete = False
            if lying := set(files) & set(self._keys):
                self._note(f"{len(lying)} files lie in shard {shard.number} of {shard.split}, which is not committed")
        elif not np.isin(status, (STORED, SKIPPED)).all():
            self._damaged(shard, STATUS, None, f"its marks are {sorted(set(status.tolist()))}; legal: 1 and 2")
        else:
            self._layers(shard, status)

    def _layers(self, shard: "_Shard", status: UInt8[np.ndarray, "rows"]) -> None:
        digests: UInt32[np.ndarray, "1 layers"] | None = self._read(shard, DIGEST)
        for position, layer in enumerate(self._schema.layers):
            parts = [self._read(shard, name, layer) for name in layer_arrays(self._schema, layer)]
            if digests is None or any(part is None for part in parts):
                continue
            if layer_digest(Encoded(*parts), status) != digests[0, position]:  # type: ignore[arg-type]
                reason = "its values or marks are whole, but not those that were committed: files were exchanged"
                self._damaged(shard, layer_name(layer), layer, reason)

    def _read(self, shard: "_Shard", name: str, layer: int | None = None) -> np.ndarray | None:
        """One shard of an array; None where the array is at fault as a whole, or the shard damaged."""
        array = shard.arrays[name]
        if array is None:
            return None
        rows = self._schema.shards(shard.split).rows(shard.number)
        part = slice(shard.number, shard.number + 1) if name == DIGEST else slice(rows.start, rows.stop)
        try:
            self._require_bytes(shard, name, part)
            values = np.asarray(wait([array[part].read()], "read it")[0])
        except AccessError as error:
            self._damaged(shard, name, layer, error.reason)
            return None
        self._report.bytes_read += values.nbytes
        return values

    def _require_bytes(self, shard: "_Shard", name: str, part: slice) -> None:
        array = shard.arrays[name]
        assert array is not None
        claimed = (part.stop - part.start) * math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize
        file, compressed = self._file(shard.split, name, shard.number), self._schema.compressor is not None
        self._folder.require_bytes(file, claimed, compressed)

    def _strays(self) -> None:
        under_way = tuple(f"{name}/" for name in _attempt(self._report, names_of_added, self._folder) or ())
        strays = set(self._keys) - self._known
        if added := {key for key in strays if key.startswith(under_way)}:
            self._note(f"{len(added)} files are of layers that are being added; they are no part of the store yet")
        for key in sorted(strays - added):
            whole = _WHOLE_ARRAY.fullmatch(key)
            if key == f"{LOCK}/zarr.json":
                owner = _attempt(self._report, read_owner, self._folder)
                self._note(f"{owner or 'a job'} holds the store; what it writes at this time may look damaged")
            elif key.endswith(".__lock"):
                self._note(f"{key} is left from a write that was killed, or under way; it does no harm")
            elif not whole or whole[1] not in self._whole_arrays:
                self._note(f"{key} is no part of the store")

    def _file(self, split: str, name: str, shard: int) -> str:
        return f"{split}/{shard_file(name, shard_arrays(self._schema, split)[name], shard)}"

    def _damaged(self, shard: "_Shard", name: str, layer: int | None, reason: str) -> None:
        rows, file = self._schema.shards(shard.split).rows(shard.number), self._file(shard.split, name, shard.number)
        damage = Damage(shard.split, layer, shard.number, (rows.start, rows.stop), file, reason)
        self._report.damaged.append(damage)

    def _fault(self, name: str, text: str) -> None:
        self._report.faults.append(f"{self._folder.place}{name} {text}")

    def _note(self, text: str) -> None:
        self._report.notes.append(text)


@dataclass(frozen=True)
class _Shard:
    """One shard of a split; `arrays` are None where they cannot be opened."""

    split: str
    number: int
    arrays: dict[str, ts.TensorStore | None]
