"""Runs in a worker process: answers requests to decode frames of videos, or to identify the decoder.

It imports neither torch nor Pillow, so that it starts in a moment. A request is a line of JSON; an answer is a line of
JSON, followed by the bytes of the frames. The output of decoders and their libraries is discarded; error messages about
a damaged file are part of the answer.
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

from extract.video.clip_sampling import Sampling
from extract.video.containers import BadVideoError
from extract.video.decoder_digest import decoder_digest, decoder_versions
from extract.video.decoding import read_frames

READY = b"ready\n"
# Seconds after the time limit at which a worker ends itself: its parent, which should have killed it, is gone.
_GRACE_SECONDS = 10.0


def serve() -> None:
    """Answer until standard input ends, which it does when the parent process ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    answers.write(READY)
    answers.flush()
    for line in requests:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"] + _GRACE_SECONDS, exit=True, file=devnull)
        _answer(request, answers)
        faulthandler.cancel_dump_traceback_later()


def _answer(request: dict[str, Any], answers: BinaryIO) -> None:
    header, frames = _info() if "info" in request else _decode(request)
    answers.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        answers.write(frames.data.cast("B"))
    answers.flush()


def _info() -> tuple[dict[str, Any], None]:
    return {"digest": decoder_digest(), "versions": decoder_versions()}, None


def _decode(request: dict[str, Any]) -> tuple[dict[str, Any], UInt8[np.ndarray, "frames height width 3"] | None]:
    start, end = (None if request[key] is None else Fraction(request[key]) for key in ("start", "end"))
    try:
        frames, clips = read_frames(request["path"], Sampling(**request["sampling"]), start, end)
    except OSError as error:
        return {"unreadable": error.strerror or str(error)}, None
    except Exception as error:  # for damaged bytes a decoder may raise nearly any error
        return {"undecodable": _describe(error)}, None
    return {"shape": frames.shape, "clips": clips}, frames


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, BadVideoError) or not isinstance(error, av.FFmpegError):
        return str(error) or type(error).__name__
    log: Any = error.log  # (level, name, message); the type stub of PyAV 18 is wrong
    details = f" ({log[2].strip()})" if log else ""
    return f"{error.strerror or type(error).__name__}{details}"
