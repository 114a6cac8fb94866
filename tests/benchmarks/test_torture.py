"""benchmarks/torture.py in small: it counts what it kills, and finds a protocol that a kill breaks."""

import json
import re
from pathlib import Path

import pytest
from torture_job import torture

MARKS_FIRST = """
from extract.job import extraction as run

def commit(writer, split, number, shard, seconds):
    writer.log_and_mark(split, number, shard.status, seconds, shard.forward_seconds, shard.skipped)
    writer.write(split, number, shard.tokens, shard.status)

run._commit = commit
"""
OTHER_BYTES = """
from benchmarks import torture

compare = torture.Scenario._compare
torture.Scenario._compare = lambda scenario, found: compare(scenario, {**found, "zarr.json": b"", "stray": b""})
"""
ONE_PROCESS = ("--worker-kills", "0", "--growth-kills", "0")


@pytest.mark.slow
def test_kills_of_every_kind_of_job_leave_no_difference(tmp_path: Path) -> None:
    out = tmp_path / "torture.json"
    status, printed = torture("--kills", "20", "--worker-kills", "1", "--out", str(out))
    assert status == 0, printed
    found = json.loads(out.read_text())
    kills, phases, victims = found["kills"], found["kills_by_phase"], found["kills_by_victim"]
    assert sum(phases.values()) == sum(victims.values()) == sum(found["kills_by_tenth"]) == kills >= 20
    assert list(phases) == ["data", "commit", "metadata", "nothing"]
    assert min(phases[name] for name in ("data", "commit", "metadata")) >= 2, phases
    assert {name.split(":")[0] for name in victims} == {"one process", "two workers", "growth"}
    assert len(found["kills_by_tenth"]) == 10
    assert min(found["shards"].values()) >= 40
    assert found["resumes"] == kills - victims.get("two workers: worker", 0), "whoever else died was resumed"
    lines = printed.splitlines()
    assert "kills by phase: " + ", ".join(f"{name} {count}" for name, count in phases.items()) in lines
    assert "kills by tenth: " + " ".join(map(str, found["kills_by_tenth"])) in lines
    assert {f"resumes: {found['resumes']}", f"seconds: {found['seconds']}"} < set(lines)
    assert lines[-1] == f"{kills} kills, 0 differences"


@pytest.mark.slow
def test_a_protocol_that_marks_before_it_writes_is_found() -> None:
    status, printed = torture("--kills", "10", *ONE_PROCESS, planted=MARKS_FIRST)
    assert status == 1, printed
    assert re.search(r"^one process, store \d+: (train|test)/layer_\d\d/c/\d+/0/0: missing$", printed, re.MULTILINE)
    assert re.search(r"^\d+ kills, [1-9]\d* differences$", printed.splitlines()[-1])


@pytest.mark.slow
def test_files_with_other_bytes_and_files_too_many_are_differences() -> None:
    status, printed = torture("--kills", "2", *ONE_PROCESS, planted=OTHER_BYTES)
    assert status == 1, printed
    assert "one process, store 1: stray: too many\none process, store 1: zarr.json: other bytes\n" in printed
    stores = int(re.findall(r"^stores: (\d+)$", printed, re.MULTILINE)[0])
    assert printed.splitlines()[-1] == f"2 kills, {2 * stores} differences"
