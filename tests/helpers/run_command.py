"""The command line in this process."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

import sidecache as sc

Command = Callable[..., tuple[int, str, str]]


def make_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs a command: (exit status, standard output, standard error)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sidecache", *map(str, arguments)])
        status = 0
        try:
            sc.main()
        except SystemExit as done:
            status = int(done.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "\x1b" not in out + err
        return status, out, err

    return run
