"""Runs in a process of its own: answers requests for the frames of videos, and for what decodes them.

It imports neither torch nor Pillow. A request is a line of JSON, an answer a line of JSON and then the bytes of the
frames. What decoders and their libraries print goes nowhere; what they say of a damaged file is part of the answer.
"""

import faulthandler
import json
import os
import sys
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from jaxtyping import UInt8

from extract.video.clips import Sampling
from extract.video.containers import BadVideoError
from extract.video.decoder_digest import decoder_digest, decoder_versions
from extract.video.decoding import read_frames

READY = b"ready\n"
_GRACE = 10.0  # seconds after the time limit, at which a worker ends itself: its parent, which should have, is gone


def serve() -> None:
    """Answer until the requests end, which is when the parent does."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    answers.write(READY)
    answers.flush()
    for line in requests:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"] + _GRACE, exit=True, file=nowhere)
        _answer(request, answers)
        faulthandler.cancel_dump_traceback_later()


def _answer(request: dict[str, Any], answers: BinaryIO) -> None:
    header, frames = _probe() if "probe" in request else _decode(request)
    answers.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        answers.write(frames.data.cast("B"))
    answers.flush()


def _probe() -> tuple[dict[str, Any], None]:
    return {"digest": decoder_digest(), "versions": decoder_versions()}, None


def _decode(request: dict[str, Any]) -> tuple[dict[str, Any], UInt8[np.ndarray, "frames height width 3"] | None]:
    start, end = (None if request[key] is None else Fraction(request[key]) for key in ("start", "end"))
    try:
        frames, shown = read_frames(request["path"], Sampling(**request["sampling"]), start, end)
    except OSError as error:
        return {"unreadable": error.strerror or str(error)}, None
    except Exception as error:  # from damaged bytes a decoder may raise nearly anything
        return {"undecodable": _reason(error)}, None
    return {"shape": frames.shape, "shown": shown}, frames


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, BadVideoError) or not isinstance(error, av.FFmpegError):
        return str(error) or type(error).__name__
    log: Any = error.log  # (level, name, message); the stub of PyAV 18 says otherwise
    said = f" ({log[2].strip()})" if log else ""
    return f"{error.strerror or type(error).__name__}{said}"
