"""Fixtures of the tests of whole jobs."""

import pytest
from run_command import Command, make_command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: (exit status, standard output, standard error)."""
    return make_command(monkeypatch, capsys)
