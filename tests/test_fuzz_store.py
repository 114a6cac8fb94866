"""Stores damaged at random: reading or `verify` finds it, or every value is as before; nothing else ever happens.

150 mutations run here, SIDECACHE_FUZZ of them where that is set; `benchmarks/fuzz.py` runs any number, and a flip in
every single byte.
"""

import json
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import small_store
from test_damage import everything

from store.errors import JobError, UserError
from store.metadata import CHECKSUM, document_checksum
from store.reader import open_store
from store.verify import verify_store

Contents = dict[str, bytes]
Changes = dict[str, bytes | None]
STORES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16, zstd": {"dtype": "float16", "compressor": "zstd"},
    "bfloat16, blosc, multi-label": {"dtype": "bfloat16", "compressor": "blosc", "multi_label": True},
    "int8": {"dtype": "int8"},
    "int8, gzip": {"dtype": "int8", "compressor": "gzip"},
}
FOUND = ("harmless", "reported", "refused", "found by verify alone")
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
    return sorted(contents)[draw.integers(len(contents))]


def two_files(contents: Contents, draw: np.random.Generator) -> tuple[str, str]:
    """Mostly two of equal length: these are the ones that checksums alone do not tell apart."""
    first = one_file(contents, draw)
    alike = [name for name in sorted(contents) if name != first and len(contents[name]) == len(contents[first])]
    others = alike if alike and draw.random() < 0.8 else sorted(set(contents) - {first})
    return first, others[draw.integers(len(others))]


def flip(contents: Contents, draw: np.random.Generator, bits: int = 1) -> Changes:
    name = one_file(contents, draw)
    content = bytearray(contents[name])
    for place in draw.integers(0, len(content), bits):
        content[place] ^= 1 << int(draw.integers(8))
    return {name: bytes(content)}


def flip_many(contents: Contents, draw: np.random.Generator) -> Changes:
    return flip(contents, draw, int(draw.integers(2, 20)))


def truncate(contents: Contents, draw: np.random.Generator) -> Changes:
    name = one_file(contents, draw)
    return {name: contents[name][: draw.integers(len(contents[name]))]}


def grow(contents: Contents, draw: np.random.Generator) -> Changes:
    name, more = one_file(contents, draw), draw.bytes(int(draw.integers(1, 100)))
    return {name: more + contents[name] if draw.random() < 0.3 else contents[name] + more}


def zero(contents: Contents, draw: np.random.Generator) -> Changes:
    name = one_file(contents, draw)
    n_bytes = len(contents[name])
    start = int(draw.integers(n_bytes)) if draw.random() < 0.5 else 0
    return {name: contents[name][:start] + bytes(n_bytes - start)}


def delete(contents: Contents, draw: np.random.Generator) -> Changes:
    return {one_file(contents, draw): None}


def garbage(contents: Contents, draw: np.random.Generator) -> Changes:
    n_bytes = int(draw.integers(200))
    return {one_file(contents, draw): DEEP if draw.random() < 0.1 else draw.bytes(n_bytes)}


def swap(contents: Contents, draw: np.random.Generator) -> Changes:
    first, second = two_files(contents, draw)
    return {first: contents[second], second: contents[first]}


def copy(contents: Contents, draw: np.random.Generator) -> Changes:
    first, second = two_files(contents, draw)
    return {first: contents[second]}


def replace(document: Any, draw: np.random.Generator) -> None:
    """Change one value somewhere in a document, or leave it out."""
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
    name = one_file({name: content for name, content in contents.items() if name.endswith(".json")}, draw)
    document = json.loads(contents[name])
    replace(document, draw)
    return {name: json.dumps(document, indent=1).encode()}


def edit_and_sign(contents: Contents, draw: np.random.Generator) -> Changes:
    """An array's metadata, changed by somebody who knows how to checksum them: nothing may be believed at all."""
    arrays = {name: content for name, content in contents.items() if json_array(name, content)}
    name = one_file(arrays, draw)
    document = json.loads(contents[name])
    replace(document, draw)
    if isinstance(document.get("attributes"), dict):
        document["attributes"][CHECKSUM] = document_checksum(document)
    return {name: json.dumps(document, indent=1).encode()}


def json_array(name: str, content: bytes) -> bool:
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
    """What came of one mutation; `outcome` is one of FOUND, or a fault of ours, which `detail` explains."""

    number: int
    store: str
    kind: str
    files: tuple[str, ...]
    outcome: str
    detail: str = ""


class Subject:
    """A store to damage, and what it reads as while it is whole."""

    def __init__(self, path: Path, multi_label: bool = False, **options: Any) -> None:
        self.path = path
        with mock.patch.dict(small_store.SIZES, test=5):  # of equal size, the splits can be mistaken for one another
            wanted = small_store.schema(multi_label=multi_label, **options)
            small_store.complete(path, wanted, skip=[1])
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        self.contents: Contents = {str(file.relative_to(path)): file.read_bytes() for file in files}
        self.truth = self.observed()

    def observed(self) -> dict[str, Any]:
        store = open_store(self.path)
        with np.errstate(all="ignore"):  # exchanged files may read as values that overflow
            return {**everything(self.path), "schema": store.schema, "log": store.log}

    def apply(self, changes: Changes) -> None:
        for name, content in changes.items():
            file = self.path / name
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)

    def judge(self, changes: Changes) -> tuple[str, str]:
        """Outcome and detail of some changes, which are undone again."""
        self.apply(changes)
        try:
            read, sound = self._read(), self._sound()
        except Exception:  # the very thing that is looked for
            return "crash", traceback.format_exc()
        finally:
            self.apply({name: self.contents[name] for name in changes})
        if read == "same":
            return ("harmless", "") if sound else ("reported", "")
        if sound:
            return f"{read}, and verify calls the store sound", ""
        return "refused" if read == "refused" else "found by verify alone", ""

    def _read(self) -> str:
        try:
            observed = self.observed()
        except (JobError, UserError):
            return "refused"
        try:
            np.testing.assert_equal(observed, self.truth)
        except AssertionError:
            return "other values"
        return "same"

    def _sound(self) -> bool:
        report = verify_store(self.path)
        assert json.loads(json.dumps(report.document()))["ok"] == report.ok
        return report.ok and report.complete


def mutations(folder: Path, count: int, seed: int = 0) -> Iterator[Result]:
    """Damage stores of every format, one mutation after the other; each depends on seed and number alone."""
    subjects = {name: Subject(folder / f"{k}.zarr", **options) for k, (name, options) in enumerate(STORES.items())}
    for number in range(count):
        draw = np.random.default_rng([seed, number])
        name, kind = sorted(STORES)[draw.integers(len(STORES))], sorted(KINDS)[draw.integers(len(KINDS))]
        subject = subjects[name]
        changes = KINDS[kind](subject.contents, draw)
        yield Result(number, name, kind, tuple(changes), *subject.judge(changes))


def test_a_mutation_is_found_or_harmless_and_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = list(mutations(tmp_path, int(os.environ.get("SIDECACHE_FUZZ", "150"))))
    assert [result for result in results if result.outcome not in FOUND] == []
    assert {result.kind for result in results} == set(KINDS)
    assert {"harmless", "reported", "refused"} <= {result.outcome for result in results}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


def flips(folder: Path, options: dict[str, Any], step: int = 1) -> Iterator[tuple[str, int, bool]]:
    """One bit flipped in every `step`-th byte of a store: the file, the byte, and whether it is found or harmless."""
    subject = Subject(folder / "flips.zarr", **options)
    draw = np.random.default_rng(0)
    for name, content in subject.contents.items():
        for place in range(int(draw.integers(min(step, len(content)))), len(content), step):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(draw.integers(8))
            subject.apply({name: bytes(flipped)})
            yield name, place, not verify_store(subject.path).ok or same_document(bytes(flipped), content)
            subject.apply({name: content})


def same_document(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False


@pytest.mark.parametrize("options", STORES.values(), ids=list(STORES))
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, options: dict[str, Any]) -> None:
    found = list(flips(tmp_path, options, step=499))
    assert len({name for name, _, _ in found}) > 50
    assert [(name, place) for name, place, known in found if not known] == []
