"""Output of the commands is readable on every terminal, and names cannot inject control sequences."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.table import Table
from tiny_vit import TINY

import sidecache as sc
from adapt.create import print_methods
from store.console.progress import progress
from store.console.terminal import Terminal
from store.console.visible import one_line, visible
from store.verify_report import Damage, Report, print_report

ROOT = Path(__file__).parents[2]
CLASSES = ("é\x1b[2J", "[b]\u202e:smile:", "a\nfault: b\tc")
HOSTILE = "é[b]\x1b[2J\u202e\n:smile:[red]"
WRITTEN_OUT = "é[b]\\u001b[2J\\u202e\\n:smile:[red]"


class Printed(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Printed]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a damaged store and a pipeline.yaml whose job has run on classes that are hard to print."""
    folder = tmp_path_factory.mktemp("job")
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in CLASSES:
            (folder / HOSTILE / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / HOSTILE / split / name / f"{number}.png")
    document = {
        "run_dir": f"run {HOSTILE}",
        "data": {"source": "folder", "root": HOSTILE, "val_fraction": 0.5},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
        "store": {"path": f"cache {HOSTILE}.zarr", "dtype": "float32", "shard_samples": 6},
        "train": {"epochs": 1, "seeds": [0], "refit": False},
        "methods": ["linear_probe"],
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document))
    sc.run(sc.load_config(folder / "pipeline.yaml"))
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process, as on a terminal with an encoding."""

    def run(*arguments: object, encoding: str = "utf-8") -> Printed:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]  # strict
        monkeypatch.setattr(sys, "argv", ["sidecache", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        status = 0
        try:
            sc.main()
        except SystemExit as done:
            status = int(done.code or 0)
        return Printed(status, *(stream.buffer.getvalue().decode(encoding) for stream in streams))  # type: ignore[attr-defined]

    return run


def arguments_of(name: str, job: Path) -> list[object]:
    image = next((job / HOSTILE / "test" / CLASSES[0]).iterdir())
    adaptor = next((job / f"run {HOSTILE}" / "adaptors").glob("*.safetensors"))
    return {
        "run": ["run", job / "pipeline.yaml"],
        "run with a mistake": ["run", job / "pipeline.yaml", "-o", f"train.{HOSTILE}=1"],
        "extract": ["extract", job / "pipeline.yaml"],
        "train": ["train", job / "pipeline.yaml"],
        "report": ["report", job / f"run {HOSTILE}"],
        "inspect": ["inspect", job / f"cache {HOSTILE}.zarr"],
        "verify": ["verify", job / f"cache {HOSTILE}.zarr"],
        "predict": ["predict", adaptor, image],
        "predict nothing": ["predict", adaptor, HOSTILE],
        "plan": ["plan", job / "pipeline.yaml"],
        "methods": ["methods", "--backbone", "vit_tiny_patch16_224", "--num-classes", "3"],
        "methods of none": ["methods", "--backbone", HOSTILE],
        "intrinsic": ["intrinsic", job / "pipeline.yaml", "--dims", "1"],
        "no command": [HOSTILE],
        "no option": ["run", f"--{HOSTILE}"],
    }[name]


FAILS = {"run with a mistake", "predict nothing", "methods of none", "no command", "no option"}
NAMES = [
    "run",
    "extract",
    "train",
    "report",
    "inspect",
    "verify",
    "predict",
    "plan",
    "methods",
    "intrinsic",
    *sorted(FAILS),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("name", NAMES)
def test_every_command_prints_text(job: Path, command: Command, name: str, encoding: str) -> None:
    printed = command(*arguments_of(name, job), encoding=encoding)
    assert printed.status == (2 if name in FAILS else 0), printed.err
    shown = printed.out + printed.err
    assert shown == visible(shown)
    assert "Traceback" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("fault: b")], "a name started a new line"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", ["inspect", "verify", "predict", "plan", "methods", "intrinsic"])
def test_json_is_exact_on_every_terminal(job: Path, command: Command, name: str, encoding: str) -> None:
    as_json = ["--format", "json"] if name == "predict" else ["--json"]
    printed = command(*arguments_of(name, job), *as_json, encoding=encoding)
    document = json.loads(printed.out)
    if name == "inspect":
        assert tuple(document["classes"]) == tuple(sorted(CLASSES))
    if name == "predict":
        assert document[0]["class"] in CLASSES


def test_a_prediction_is_one_line(job: Path, command: Command) -> None:
    image = next((job / HOSTILE / "test" / CLASSES[0]).iterdir())
    [line] = command(*arguments_of("predict", job)).out.splitlines()
    file, name, _ = line.split("\t")
    assert file == one_line(str(image))
    assert name in map(one_line, CLASSES)


# Tables


def printed_by(monkeypatch: pytest.MonkeyPatch, show: Callable[[], object]) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    show()
    return sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_brackets_and_colons_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"[/b]{HOSTILE}"
    assert printed_by(monkeypatch, lambda: Terminal().print(text)) == f"{visible(text)}\n"
    table = Table(text, title=text)
    table.add_row(text)
    assert printed_by(monkeypatch, lambda: Terminal().print(table)).count("[/b]é[b]\\u001b[2J\\u202e") == 3


def test_a_report_has_a_line_for_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(HOSTILE, faults=[HOSTILE], notes=[HOSTILE])
    report.damaged.append(Damage(split=HOSTILE, layer=None, shard=1, rows=(0, 3), file=HOSTILE, reason=HOSTILE))
    lines = printed_by(monkeypatch, lambda: print_report(report)).splitlines()
    assert [line.partition(" ")[0] for line in lines[:-1]] == ["damaged:", "fault:", "note:"]
    assert all(WRITTEN_OUT in line for line in lines)


def test_a_list_of_methods_shows_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        {"method": "[/x]", "needs": "features", "trainable_params": None, "head_params": None, "unavailable": "[/y]"}
    ]
    shown = printed_by(monkeypatch, lambda: print_methods(listed, HOSTILE))
    assert "[/x]: [/y]" in shown
    assert visible(HOSTILE).splitlines()[0] in shown


def test_progress_shows_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(HOSTILE, 2, "samples") as advance:
        advance(1)
    assert WRITTEN_OUT in sys.stderr.getvalue()  # type: ignore[attr-defined]


# Streams


def started(*arguments: str, redirect: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command started by a shell, with its output redirected."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -m sidecache "$@" {redirect}', sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize(
    ("redirect", "environment"),
    [
        ("", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("", {"PYTHONIOENCODING": "latin-1"}),
        (">&-", {}),
        ("2>&-", {}),
        (">&- 2>&-", {}),
        ("| head -n 1", {}),
    ],
)
def test_any_stream_will_do(redirect: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = started("verify", f"{tmp_path}/é€", redirect=redirect, **environment)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "2>&-" not in redirect:
        [line] = done.stderr.splitlines()
        assert line.startswith("sidecache: there is no store at ")
    if "|" not in redirect:
        assert done.returncode == 1
