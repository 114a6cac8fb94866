"""Stores damaged at random: reading is refused, or every value is unchanged; there is no other outcome.

After each mutation everything is read: rows as slices, in random order and one by one, each from a reader that has read
nothing before. Other values without an error are a wrong read, regardless of `verify`. The one exception is by design:
if intact files of shards are exchanged, reading rows cannot detect it, but `verify` must.

150 mutations run here, SIDECACHE_FUZZ of them where that is set; `benchmarks/fuzz.py` runs any number, and a flip in
every single byte.
"""

import os
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from slow_cases import all_but_first_slow
from store_fuzzer import FOUND, KINDS, STORES, WRONG, Subject, flip, flips, make_subjects, mutations


def test_a_mutation_is_found_or_harmless_and_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = list(mutations(make_subjects(tmp_path), int(os.environ.get("SIDECACHE_FUZZ", "150"))))
    assert [result for result in results if result.outcome not in FOUND] == []
    assert {result.kind for result in results} == set(KINDS)
    assert {"harmless", "reported", "refused"} <= {result.outcome for result in results}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


@pytest.mark.parametrize("options", all_but_first_slow(STORES.values()), ids=list(STORES))
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, options: dict[str, Any]) -> None:
    found = list(flips(Subject(tmp_path / "flips.zarr", **options), step=499))
    assert len({name for name, _, _ in found}) > 50
    assert [(name, place, outcome) for name, place, outcome in found if outcome not in FOUND] == []


# The fuzzer itself: with a check disabled, it must find wrong reads.

ANYTHING = mock.ANY  # equal to everything
CHECKS = {
    "of rows": (
        "store.local.chunks.google_crc32c",
        mock.Mock(value=lambda content: ANYTHING),
        "train/layer_00/c/0/0/0",
    ),
    "of small arrays": ("store.array_io._content_digest", lambda *_: ANYTHING, "train/label/c/0"),
    "of metadata": ("store.kvstore.document_checksum", lambda _: ANYTHING, "zarr.json"),
}


@pytest.mark.parametrize("check", all_but_first_slow(CHECKS.values()), ids=list(CHECKS))
def test_the_fuzzer_sees_what_is_read_wrong_once_a_checksum_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: tuple[str, Any, str]
) -> None:
    place, anything, file = check
    subject = Subject(tmp_path / "c.zarr", dtype="float32")
    subject.contents = {file: subject.contents[file]}

    def outcomes() -> tuple[set[str], set[str]]:
        with mock.patch.dict(KINDS, {"flip": flip}, clear=True):
            mutated = {result.outcome for result in mutations({"float32": subject}, 40)}
        return mutated, {outcome for _, _, outcome in flips(subject, max(1, len(subject.contents[file]) // 40))}

    for found in outcomes():
        assert found <= set(FOUND)
    monkeypatch.setattr(place, anything)
    for found in outcomes():
        assert WRONG in found
