"""A loss of power costs only what was not committed; committed files are on the disk."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_store
from power_loss import lose_power
from small_store import contents
from torture_job import torture

from store.address import new_context
from store.array_io import open_array

ROOT = Path(__file__).parents[2]
WRITES = f"""
import sys
sys.path[:0] = ["{ROOT}", "{ROOT / "tests/helpers"}"]
import small_store
small_store.complete(sys.argv[1], small_store.schema("int8"))
"""


@pytest.mark.slow
def test_killed_jobs_whose_uncommitted_files_are_ruined_resume_to_the_same_bytes() -> None:
    status, printed = torture("--kills", "16", "--worker-kills", "0", "--growth-kills", "6", "--power-loss")
    assert status == 0, printed
    assert int(re.findall(r"^files damaged: (\d+)$", printed, re.MULTILINE)[0]) > 16
    assert re.search(r"growth: job [1-9]", printed)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float32"])
def test_shards_that_were_not_marked_are_replaced_whatever_is_left_of_them(tmp_path: Path, dtype: str) -> None:
    """Also part-filled ones, which tensorstore reads before it writes them."""
    wanted, path = small_store.schema(dtype), tmp_path / "c.zarr"
    small_store.complete(path, wanted)
    whole = contents(path)
    for seed in range(6):  # each file is deleted, cut off and zeroed
        for mark in ("train/status/c/1", "train/status/c/2", "test/status/c/0"):
            (path / mark).unlink()
        doomed = lose_power(path, random.Random(seed))
        assert len(doomed) == 3 * (5 if dtype == "int8" else 3), doomed
        assert {name.split("/c/")[1][0] for name in doomed if name.startswith("train")} == {"1", "2"}
        small_store.complete(path, wanted)
        assert contents(path) == whole, seed


def test_before_the_root_group_everything_is_in_danger_but_the_lock(tmp_path: Path) -> None:
    small_store.create(tmp_path, small_store.schema())
    (tmp_path / "zarr.json").unlink()
    (tmp_path / "_log/lock").mkdir()
    (tmp_path / "_log/lock/zarr.json").write_text("{}")
    assert set(lose_power(tmp_path, random.Random(0))) > {"tail/norm.weight/c/0", "_log/zarr.json"}
    assert (tmp_path / "_log/lock/zarr.json").read_text() == "{}"
    small_store.complete(tmp_path, small_store.schema())


def test_nothing_turns_tensorstores_syncing_off(tmp_path: Path) -> None:
    small_store.create(tmp_path, small_store.schema())
    opened = small_store.kvstore_at(tmp_path)
    array = open_array(opened, "train/layer_00")
    for kvstore in (opened._driver, array.kvstore):
        assert kvstore.spec(retain_context=True).to_json()["file_io_sync"] is True
    assert new_context()["file_io_sync"].to_json() is True


# System calls as strace prints them: `process call(...) = result`, interleaved with those of other threads.
_CALL = re.compile(r"(\d+) +(fsync|rename)\((.*?)(?: <unfinished \.\.\.>|\) += (-?\d+).*)$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (?:fsync|rename) resumed>.*\) += (-?\d+)")
_PATH = re.compile(r'[<"](/[^>"]*)[>"]')


def synced_renames(log: str) -> dict[str, tuple[int, int]]:
    """File -> lines of strace's log where it was renamed, after a sync, and where its folder was synced."""
    begun: dict[str, str] = {}
    ended: list[tuple[int, int, str]] = []  # first and last line of a call, and the call
    started: dict[str, int] = {}
    for number, line in enumerate(log.splitlines()):
        if call := _CALL.match(line):
            process, name, arguments, result = call.groups()
            begun[process], started[process] = f"{name} {' '.join(_PATH.findall(arguments))}", number
            if result == "0":
                ended.append((number, number, begun[process]))
        elif (resumed := _RESUMED.match(line)) and resumed[2] == "0":
            ended.append((started[resumed[1]], number, begun[resumed[1]]))
    found = {}
    for first, last, rename in ended:
        if rename.startswith("rename "):
            temporary, file = rename.split()[1:]
            assert any(end < first and call == f"fsync {temporary}" for _, end, call in ended), f"{file}: not synced"
            folder = f"fsync {Path(file).parent}"
            found[file] = first, min(end for start, end, call in ended if start > last and call == folder)
    return found


def test_what_a_mark_or_a_root_group_vouches_for_was_synced_before_it_had_its_name(tmp_path: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not here: it shows what is synced when")
    log, store = tmp_path / "log", tmp_path / "c.zarr"
    trace = ["strace", "-f", "-y", "-s", "4096", "-e", "trace=fsync,rename", "-o", str(log)]
    done = subprocess.run([*trace, sys.executable, "-c", WRITES, str(store)], capture_output=True, text=True)
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip(f"processes cannot be traced here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    renames = {os.path.relpath(file, store): at for file, at in synced_renames(log.read_text()).items()}
    assert set(contents(store)) | {"_log/zarr.json"} == set(renames)
    for split, n_shards in (("train", 3), ("test", 1)):
        for shard in range(n_shards):
            parts = [name for name in renames if re.match(rf"{split}/(layer|scale|shard).*/c/{shard}/", name)]
            assert len(parts) == 5
            assert all(renames[part][1] < renames[f"{split}/status/c/{shard}"][0] for part in parts), (split, shard)
    before_root = [name for name in renames if "/c/" not in name or name.startswith(("tail/", "rms/"))]
    before_root += [f"{split}/{name}" for split in ("train", "test") for name in ("label/c/0", "sample_id/c/0")]
    assert len(before_root) > 25
    for name in {*before_root} - {"zarr.json", "_log/zarr.json"}:  # the log is written again with every shard
        assert renames[name][1] < renames["zarr.json"][0], name
