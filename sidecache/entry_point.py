"""Runs the command line, and turns failures into one line on standard error and an exit status."""

import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer

from sidecache.command_line import app
from sidecache.messages import log

_UsageError: Any = typer.BadParameter.__base__  # typer does not export it


def main() -> None:
    """The command `sidecache`. Exit status: 0 success, 1 failure, 2 a mistake of the user, 130 interrupted."""
    _require_own_packages()
    from adapt.failures import explain_failure
    from store.console.visible import visible
    from store.errors import UserError

    _open_streams()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        status = app(prog_name="sidecache", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        error.message = visible(error.message)
        error.show(sys.stderr)  # without a file click would write UTF-8 even to an ASCII terminal
        sys.exit(error.exit_code)
    except UserError as error:
        _fail(error, 2)
    except BrokenPipeError:  # the reader of standard output has closed it, as in `sidecache methods | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        reason = explain_failure(error)
        if reason is None:
            raise  # a bug, which needs its traceback
        _fail(reason, 1)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:  # newer versions of typer return it for an interrupt
        _fail("interrupted; the same command goes on from here", 130)


def _require_own_packages() -> None:
    """Refuse unrelated packages from PyPI named adapt, extract or store in place of our own."""
    root = Path(__file__).resolve().parents[1]
    for name in ("adapt", "extract", "store"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parents[1] != root:
            where = spec.origin if spec else "nowhere"
            raise SystemExit(
                f"sidecache: the package {name!r} is found at {where}, not beside sidecache itself; "
                f"another distribution owns that name: `pip uninstall {name}`, or use a separate environment"
            )


def _open_streams() -> None:
    """Make output streams accept every character (escaped if needed); output to a closed stream is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, category: type[Warning], *location: Any) -> None:
    from store.errors import Note

    if issubclass(category, Note):
        log(f"note: {message}")
    else:
        log(warnings.formatwarning(message, category, *location[:2]).rstrip())


def _fail(reason: object, status: int) -> NoReturn:
    log(f"sidecache: {reason}")
    sys.exit(status)
