"""Damages small stores at random, and reads every value of them."""

import json
import pickle
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import small_store
from small_store import LAYERS

from store.errors import JobError, UserError
from store.reader import Store, open_store
from store.verify import verify_store
from store.zarr_metadata import CHECKSUM, document_checksum

Contents = dict[str, bytes]


Changes = dict[str, bytes | None]
STORES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16, zstd": {"dtype": "float16", "compressor": "zstd"},
    "bfloat16, blosc, multi-label": {"dtype": "bfloat16", "compressor": "blosc", "multi_label": True},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int8, gzip": {"dtype": "int8", "compressor": "gzip"},
}
SKIPPED = 1  # the row of train that is skipped
ROWS = {"train": (0, 2, 3, 4), "test": (0, 1, 2, 3, 4)}  # that can be read


LOG, REASONS = "the log", "why samples were skipped"
FOUND = ("harmless", "reported", "refused", "exchanged shards, found by verify")
WRONG = "WRONG READ"
_OF_SHARD = re.compile(r"(train|test)/((layer|scale)_\d+|status|shard_digest)/c/.*")
STRANGE = (
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    10**30,
    1e308,
    None,
    True,
    "",
    "x",
    [],
    {},
    [2**40],
    [2**40] * 3,
    [[]],
    {"a": 1},
)
DEEP = b'{"attributes":' + b"[" * 100_000


def one_file(contents: Contents, draw: np.random.Generator) -> str:
    """The name of a random file."""
    return sorted(contents)[draw.integers(len(contents))]


def two_files(contents: Contents, draw: np.random.Generator) -> tuple[str, str]:
    """Two files, mostly of equal length, since checksums alone do not distinguish these."""
    first = one_file(contents, draw)
    same_length = [name for name in sorted(contents) if name != first and len(contents[name]) == len(contents[first])]
    others = same_length if same_length and draw.random() < 0.8 else sorted(set(contents) - {first})
    return first, others[draw.integers(len(others))]


def flip(contents: Contents, draw: np.random.Generator, bits: int = 1) -> Changes:
    """Flip bits of a file."""
    name = one_file(contents, draw)
    content = bytearray(contents[name])
    for place in draw.integers(0, len(content), bits):
        content[place] ^= 1 << int(draw.integers(8))
    return {name: bytes(content)}


def flip_many(contents: Contents, draw: np.random.Generator) -> Changes:
    """Flip 2 to 19 bits of a file."""
    return flip(contents, draw, int(draw.integers(2, 20)))


def truncate(contents: Contents, draw: np.random.Generator) -> Changes:
    """Cut a file."""
    name = one_file(contents, draw)
    return {name: contents[name][: draw.integers(len(contents[name]))]}


def grow(contents: Contents, draw: np.random.Generator) -> Changes:
    """Add bytes before or after a file's content."""
    name, more = one_file(contents, draw), draw.bytes(int(draw.integers(1, 100)))
    return {name: more + contents[name] if draw.random() < 0.3 else contents[name] + more}


def zero(contents: Contents, draw: np.random.Generator) -> Changes:
    """Zero a file, or its end."""
    name = one_file(contents, draw)
    n_bytes = len(contents[name])
    start = int(draw.integers(n_bytes)) if draw.random() < 0.5 else 0
    return {name: contents[name][:start] + bytes(n_bytes - start)}


def delete(contents: Contents, draw: np.random.Generator) -> Changes:
    """Delete a file."""
    return {one_file(contents, draw): None}


def garbage(contents: Contents, draw: np.random.Generator) -> Changes:
    """Replace a file by random bytes or deeply nested JSON."""
    n_bytes = int(draw.integers(200))
    return {one_file(contents, draw): DEEP if draw.random() < 0.1 else draw.bytes(n_bytes)}


def swap(contents: Contents, draw: np.random.Generator) -> Changes:
    """Exchange two files."""
    first, second = two_files(contents, draw)
    return {first: contents[second], second: contents[first]}


def copy(contents: Contents, draw: np.random.Generator) -> Changes:
    """Replace a file by another one."""
    first, second = two_files(contents, draw)
    return {first: contents[second]}


def replace(document: Any, draw: np.random.Generator) -> None:
    """Change or remove one value somewhere in a document."""
    while True:
        keys: list[Any] = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = keys[draw.integers(len(keys))]
        inner = document[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
            break
        document = inner
    if draw.random() < 0.15:
        del document[key]
    else:
        document[key] = STRANGE[draw.integers(len(STRANGE))]


def edit(contents: Contents, draw: np.random.Generator) -> Changes:
    """Change a value of a document."""
    name = one_file({name: content for name, content in contents.items() if name.endswith(".json")}, draw)
    document = json.loads(contents[name])
    replace(document, draw)
    return {name: json.dumps(document, indent=1).encode()}


def edit_and_sign(contents: Contents, draw: np.random.Generator) -> Changes:
    """Change an array's metadata, with a checksum that fits."""
    arrays = {name: content for name, content in contents.items() if json_array(name, content)}
    name = one_file(arrays, draw)
    document = json.loads(contents[name])
    replace(document, draw)
    if isinstance(document.get("attributes"), dict):
        document["attributes"][CHECKSUM] = document_checksum(document)
    return {name: json.dumps(document, indent=1).encode()}


def json_array(name: str, content: bytes) -> bool:
    """Whether a file is the zarr.json of an array."""
    return name.endswith(".json") and b'"node_type": "array"' in content


KINDS: dict[str, Callable[[Contents, np.random.Generator], Changes]] = {
    "flip": flip,
    "flip_many": flip_many,
    "truncate": truncate,
    "grow": grow,
    "zero": zero,
    "delete": delete,
    "garbage": garbage,
    "swap": swap,
    "copy": copy,
    "edit": edit,
    "edit_and_sign": edit_and_sign,
}


@dataclass(frozen=True)
class Result:
    """The outcome of one mutation: one of FOUND, or a defect of the program, which `detail` explains."""

    number: int
    store: str
    kind: str
    files: tuple[str, ...]
    outcome: str
    detail: str = ""


class Subject:
    """A store to damage, and the answers to all questions while it is intact."""

    def __init__(self, path: Path, multi_label: bool = False, **options: Any) -> None:
        self.path = path
        with mock.patch.dict(small_store.SIZES, test=5):  # splits of equal size have files of equal length
            wanted = small_store.schema(multi_label=multi_label, **options)
            small_store.complete(path, wanted, skip=[SKIPPED])
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        self.contents: Contents = {str(file.relative_to(path)): file.read_bytes() for file in files}
        self.truth = {name: ask() for name, ask in questions(open_store(path)).items()}

    def apply(self, changes: Changes) -> None:
        """Write or delete files."""
        for name, content in changes.items():
            file = self.path / name
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)

    def judge(self, changes: Changes) -> tuple[str, str]:
        """Outcome and detail of some changes, which are then undone."""
        exchanged = all(_OF_SHARD.fullmatch(name) and self._is_whole_shard(new) for name, new in changes.items())
        self.apply(changes)
        try:
            wrong, refused = self._read()
            sound = self._sound()
        except Exception:  # a crash is an outcome
            return "crash", traceback.format_exc()
        finally:
            self.apply({name: self.contents[name] for name in changes})
        if wrong:
            return (FOUND[-1] if exchanged and not sound else WRONG), ", ".join(wrong)
        if refused:
            return ("refused, and verify calls the store sound" if sound else "refused"), ""
        return ("harmless" if sound else "reported"), ""

    def _is_whole_shard(self, content: bytes | None) -> bool:
        return any(content == whole for name, whole in self.contents.items() if _OF_SHARD.fullmatch(name))

    def _read(self) -> tuple[list[str], list[str]]:
        """The questions with a wrong answer, and those that are refused."""
        wrong, refused = list[str](), list[str]()
        try:
            asked = questions(open_store(self.path))
        except (JobError, UserError):
            return wrong, ["the store"]
        for name, ask in asked.items():
            try:
                with np.errstate(all="ignore"):  # exchanged files may read as values that overflow
                    answer = ask()
            except (JobError, UserError):
                refused.append(name)
                continue
            if not is_lost(name, answer) and not same(answer, self.truth[name]):
                wrong.append(name)
        return wrong, refused

    def _sound(self) -> bool:
        report = verify_store(self.path)
        assert json.loads(json.dumps(report.document()))["ok"] == report.ok
        return report.ok and report.complete


def questions(store: Store) -> dict[str, Callable[[], Any]]:
    """Everything that can be read from a store, by name; tokens as slices, in random order, and sample by sample.

    Samples are read by id, since rows change their numbers where marks are missing.
    """
    alone, shuffled = pickle.loads(pickle.dumps((store, store)))
    asked: dict[str, Callable[[], Any]] = {
        "schema": lambda: store.schema,
        "rms": lambda: store.rms,
        "tail": store.tail_arrays,
        LOG: lambda: store.log,
        REASONS: lambda: store.skipped("train"),
    }
    for split, rows in ROWS.items():
        asked[f"samples of {split}"] = partial(samples, store, split)
        order = np.random.default_rng(len(rows)).permutation(len(rows)).tolist()
        row_of = cache(partial(rows_by_id, alone, split))
        for layer in LAYERS:
            asked[f"layer {layer} of {split}"] = partial(store.read, split, slice(None), [layer])
            asked[f"layer {layer} of {split}, shuffled"] = partial(shuffled.read, split, order, [layer])
            for name in (ids_of(split)[row] for row in order):
                asked[f"{name}, layer {layer}"] = partial(tokens, alone, split, row_of, name, layer)
    return asked


def samples(store: Store, split: str) -> tuple[Any, ...]:
    """Number, ids, labels, digests and skipped ids of a split."""
    if store.missing_shards(split):
        store.require_complete()  # raises
    listing, skipped = store.listing(split), list(store.skipped(split))
    return store.num_samples(split), listing.ids, listing.labels, listing.digests, skipped


def ids_of(split: str) -> list[str]:
    """The ids of the samples that can be read."""
    ids = [f"{split}/ünïcode {row}.png" for row in range(5)]
    return [ids[row] for row in ROWS[split]]


def rows_by_id(store: Store, split: str) -> dict[str, tuple[int, Any]]:
    """Id -> row and label."""
    labels = store.labels(split)
    return {name: (row, labels[row]) for row, name in enumerate(store.sample_ids(split))}


def tokens(store: Store, split: str, row_of: Callable[[], dict[str, tuple[int, Any]]], name: str, layer: int) -> Any:
    """Label and tokens of a sample; None if it is missing."""
    if name not in row_of():
        return None
    row, label = row_of()[name]
    return label, store.read(split, [row], [layer])


def is_lost(name: str, answer: Any) -> bool:
    """Whether the log or the reasons are missing, which is legal: no value depends on them."""
    return (name == LOG and answer == {}) or (name == REASONS and not any(answer.values()))


def make_subjects(folder: Path) -> dict[str, Subject]:
    """Make a store of every format."""
    return {name: Subject(folder / f"{k}.zarr", **options) for k, (name, options) in enumerate(STORES.items())}


def mutations(subjects: Mapping[str, Subject], count: int, seed: int = 0) -> Iterator[Result]:
    """Damage stores, one mutation after the other; each depends only on seed and number."""
    for number in range(count):
        draw = np.random.default_rng([seed, number])
        name, kind = sorted(subjects)[draw.integers(len(subjects))], sorted(KINDS)[draw.integers(len(KINDS))]
        subject = subjects[name]
        changes = KINDS[kind](subject.contents, draw)
        yield Result(number, name, kind, tuple(changes), *subject.judge(changes))


def flips(subject: Subject, step: int = 1) -> Iterator[tuple[str, int, str]]:
    """Flip one bit in every `step`-th byte of a store; yields the file, the byte and the outcome.

    A flip that neither reading nor `verify` reports is harmless only if the JSON document stays the same.
    """
    draw = np.random.default_rng(0)
    for name, content in subject.contents.items():
        for place in range(int(draw.integers(min(step, len(content)))), len(content), step):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(draw.integers(8))
            outcome, _ = subject.judge({name: bytes(flipped)})
            if outcome == "harmless" and not same_document(bytes(flipped), content):
                outcome = "not noticed"
            yield name, place, outcome


def same(answer: Any, truth: Any) -> bool:
    """Whether an answer is the right one."""
    try:
        np.testing.assert_equal(answer, truth)
    except AssertionError:
        return False
    return True


def same_document(first: bytes, second: bytes) -> bool:
    """Whether two files are equal JSON."""
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False
