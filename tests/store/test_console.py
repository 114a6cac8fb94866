"""What is shown while work goes on: lines of the logger `sidecache`, progress, durations."""

import io
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import store.console.progress
from store.console.duration import duration
from store.console.log import log
from store.console.progress import progress


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(store.console.progress, "time", clock)
    return clock


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger, as it was before afterwards."""
    found = logging.getLogger("sidecache")
    level, handlers = found.level, list(found.handlers)
    yield found
    found.setLevel(level)
    found.handlers[:] = handlers


def test_a_line_is_logged_and_written_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log("100 % of %s")
    assert capsys.readouterr() == ("", "100 % of %s\n")


def test_a_user_of_the_library_silences_or_redirects_it(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.setLevel(logging.WARNING)
    log("silent")
    logger.setLevel(logging.INFO)
    stream = io.StringIO()
    logger.handlers[:] = [logging.StreamHandler(stream)]
    log("elsewhere")
    assert capsys.readouterr().err == ""
    assert stream.getvalue() == "elsewhere\n"


def test_every_handler_gets_text_that_can_be_written(logger: logging.Logger, tmp_path: Path) -> None:
    """Names of files may hold any bytes."""
    handler = logging.FileHandler(tmp_path / "log", encoding="utf-8")
    logger.handlers[:] = [handler]
    log("a\udcff\x1b[2J")
    handler.close()
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a\\udcff\\u001b[2J\n"


def test_of_several_processes_one_logs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    log("not here")
    assert capsys.readouterr().err == ""


class TestOffATerminal:
    def test_a_line_comes_every_half_a_minute(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("extracting train", 100, "samples") as advance:
            for _ in range(65):
                clock.now += 1.0
                advance(1)
        first, second = capsys.readouterr().err.splitlines()
        assert first == "extracting train: 30 of 100 samples, 1.0 samples/s, 1 min 10 s left"
        assert second == "extracting train: 60 of 100 samples, 1.0 samples/s, 40.0 s left"

    def test_quick_work_is_silent(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(5):
            with progress("reading", 10, "samples") as advance:
                clock.now += 29
                advance(10)
        assert capsys.readouterr().err == ""

    def test_work_that_resumes_goes_by_what_is_left(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("losa", 100, "samples", done=50) as advance:
            clock.now += 40
            advance(10, note="loss 0.5")
        assert capsys.readouterr().err == "losa: 60 of 100 samples, 0.2 samples/s, 2 min 40 s left, loss 0.5\n"

    def test_a_pass_is_shown_with_the_whole_job(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("whole job", 40, "epochs") as whole:
            clock.now += 20
            whole(10)
            with progress("losa", 400, "samples") as advance:
                clock.now += 20
                advance(100)
        [line] = capsys.readouterr().err.splitlines()
        assert line == "losa: 100 of 400 samples, 5.0 samples/s, 1 min left; whole job: 25%, 2 min left"

    def test_other_threads_may_count(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("digests", 3, "samples") as advance:
            clock.now += 31
            threads = [threading.Thread(target=advance, args=(1,)) for _ in range(3)]
            for thread in threads:
                thread.start()
                thread.join()
        assert capsys.readouterr().err.startswith("digests: 1 of 3 samples")

    def test_an_error_ends_the_work(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(KeyError), progress("first", 10, "samples"):
            raise KeyError
        with progress("second", 10, "samples") as advance:
            clock.now += 30
            advance(3)
        assert capsys.readouterr().err == "second: 3 of 10 samples, 0.1 samples/s, 1 min 10 s left\n"


class TestOnATerminal:
    @pytest.fixture
    def screen(self, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
        """A terminal of 80 columns."""
        screen = io.StringIO()
        monkeypatch.setattr(
            store.console.progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80)
        )
        return screen

    def test_nothing_wraps_at_80_columns(self, screen: io.StringIO) -> None:
        with progress("whole job", 1000, "epochs") as whole:
            whole(1)
            methods = "linear_probe, losa, conv_ladder ... seeds 0, 1, 2 (48 trials)"
            with progress(methods, 123_456, "samples") as advance:
                advance(23_456, note="loss 0.412, validation 87.20")
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
        (of_pass,) = {line for line in lines if "loss 0.412, validation 87.20" in line}
        assert of_pass.startswith("linear_probe")
        assert "23456/123456" in of_pass
        assert max(map(len, lines)) == 80
        assert any(line.startswith("whole job") for line in lines)

    def test_no_line_is_logged(self, screen: io.StringIO, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("losa", 10, "samples") as advance:
            clock.now += 100
            advance(5)
        assert capsys.readouterr().err == ""
        assert "5/10" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (61.4, "1 min 1 s"),
        (3599.6, "1 h"),
        (3600.0 + 300 + 59, "1 h 5 min"),
        (86_400.0 * 3 + 3600 * 4, "3 d 4 h"),
        (86_400.0 * 30, "30 d"),
    ],
)
def test_durations_are_in_a_persons_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
