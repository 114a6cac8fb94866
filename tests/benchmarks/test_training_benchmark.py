"""The benchmark of training runs at a small size and says all that it should; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks.training import CONTESTANTS, RATIOS, parse, presets, rows, speed

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # of the rivals
def test_every_contestant_trains_and_every_figure_is_there(tmp_path: Path) -> None:
    found = speed(parse(["speed", "--small", "--batch", "2", "--batches", "2", "--rounds", "2"]), tmp_path)
    assert set(found["figures"]) == set(CONTESTANTS)
    assert all(len(taken["seconds"]) == len(taken["cpu_seconds"]) == 2 for taken in found["figures"].values())
    assert [taken["samples"] for taken in found["figures"].values()] == [4, 4, 4, 2, 2, 2, 2]
    assert set(found["ratios, medians of the rounds' own"]) == set(RATIOS)


@pytest.mark.filterwarnings("ignore")  # of the rivals
def test_presets_are_compared_with_lora(tmp_path: Path) -> None:
    found = presets(parse(["presets", "--small", "--batch", "2", "--rounds", "1"]), tmp_path)
    kinds = ("lean, token rank 0", "lean, token rank 32", "coarse, token rank 32", "grid, token rank 32")
    names = {f"losa from {kind}" for kind in kinds}
    assert set(found["ratios, medians of the rounds' own"]) == names
    assert all(
        ratio > 0 for clocks in found["ratios, medians of the rounds' own"].values() for ratio in clocks.values()
    )
    assert set(found["figures"]) == {*names, "peft lora"}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    words = f"memory --small --memory-batch 2 --only lora --folder {tmp_path} --out {out}".split()
    subprocess.run([sys.executable, "-m", "benchmarks.training", *words], check=True, cwd=ROOT)
    assert json.loads(out.read_text())["memory, float32"]["bytes_above_the_interpreter"]["lora"] > 0


@pytest.mark.slow
def test_epochs_of_more_rows_are_compared_with_the_first(tmp_path: Path) -> None:
    found = rows(parse(["rows", "--small", "--rounds", "1", "--doublings", "1"]), tmp_path)
    for clock in ("seconds", "cpu_seconds"):
        assert found["per_row / that of the first"][clock]["1024"] == 1
        assert found["per_row / that of the first"][clock]["2048"] > 0
    assert set(found["peak_bytes"]) == {"1024", "2048"}
