"""Errors of tensorstore and the system as one line, and the bound on what a file may claim to hold."""

import os
from pathlib import Path

import pytest
from small_store import kvstore_at

from store import address
from store.errors import JobError
from store.io_errors import AccessError, OutageError, failure


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NOT_FOUND: no such key", "NOT_FOUND: no such key"),
        ("NOT_FOUND: no such key [source locations='a.cc:1']", "NOT_FOUND: no such key"),
        ("NOT_FOUND: no such key [tensorstore_spec='{}'] [source locations='a.cc:1']", "NOT_FOUND: no such key"),
        ("NOT_FOUND: no such key[tensorstore_spec='{}']", "NOT_FOUND: no such key"),
        ("UNKNOWN: refused [http_response_code='503'] [x='y']", "UNKNOWN: refused (HTTP 503)"),
    ],
)
def test_annotations_of_tensorstore_are_left_out_except_for_the_status(text: str, reason: str) -> None:
    error = failure(ValueError(text), "read x")
    assert isinstance(error, AccessError | OutageError)
    assert str(error).startswith(f"cannot read x: {reason}")


@pytest.mark.parametrize(("compressed", "most"), [(False, 100), (True, 100 * 2**15)])
def test_a_file_may_claim_what_it_can_hold_and_no_byte_more(
    compressed: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.kvstore._HARMLESS_BYTES", 0)
    (tmp_path / "key").write_bytes(bytes(100))
    kvstore = kvstore_at(tmp_path)
    kvstore.require_bytes("key", most, compressed)
    with pytest.raises(JobError, match=rf"100 bytes cannot hold the {most + 1:,} that the metadata claim"):
        kvstore.require_bytes("key", most + 1, compressed)


def test_limits_of_tensorstore_are_set_unless_the_user_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = address._LIMITS
    monkeypatch.setenv(first, "123")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    address.new_context()
    assert {name: os.environ.get(name) for name in address._LIMITS} == {**address._LIMITS, first: "123"}


@pytest.mark.parametrize(("text", "is_damage"), [("DATA_LOSS: checksum", True), ("PERMISSION_DENIED: no", False)])
def test_damage_is_told_from_other_errors(text: str, is_damage: bool) -> None:
    error = failure(ValueError(text), "read x")
    assert isinstance(error, AccessError)
    assert error.is_damage is is_damage
