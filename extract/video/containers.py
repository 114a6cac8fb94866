"""Container formats of videos, and whether a file is as long as its container says: FFmpeg is silent if it is not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "asf", "flv", "ogg")  # FFmpeg's names
ENDINGS = frozenset(  # not gif, which is an image here
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
)

_MUST_FIT = (b"moov", b"mdat", b"moof")
_SEGMENT = b"\x18\x53\x80\x67"


class BadVideoError(Exception):
    """A file is no video, or a damaged one; says what is wrong with "it"."""


def check_whole(path: str, format_name: str) -> None:
    """BadVideoError where the file is shorter than its container says.

    MPEG-TS must end with a whole packet. MPEG-PS, ASF, FLV, Ogg and live Matroska say nothing of their length.
    """
    n_bytes = os.path.getsize(path)  # noqa: PTH202 (the path is text in this process)
    with Path(path).open("rb") as file:
        promised = next((end(file, n_bytes) for name, end in _ENDS.items() if name in format_name), 0)
    if promised > n_bytes:
        raise BadVideoError(f"it is truncated: it has {n_bytes} bytes, but its container says {promised}")


def _mov_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last box of data or of headers ends."""
    end = position = 0
    while position + 8 <= n_bytes:
        file.seek(position)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        if size < 8:  # 0 is up to the file's end, the rest is no box
            break
        position += size
        if kind in _MUST_FIT:
            end = position
    return end


def _matroska_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the first segment ends; 0 where it is of unknown length, as of a live stream."""
    while identifier := file.read(4):  # the EBML header, too, has an identifier of 4 bytes
        size = _matroska_size(file)
        if size is None:
            return 0
        if identifier == _SEGMENT:
            return file.tell() + size
        file.seek(size, os.SEEK_CUR)
    return 0


def _matroska_size(file: BinaryIO) -> int | None:
    """A number whose leading zero bits say how many bytes it fills; None for all ones, which means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value


def _avi_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last RIFF chunk ends: files above 1 GB have several."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF":
        end = file.tell() + int.from_bytes(head[4:], "little")
        file.seek(end + end % 2)
    return end


def _mpegts_end(file: BinaryIO, n_bytes: int) -> int:
    """The next multiple of the length of a packet, each of which begins with 0x47, in M2TS after 4 bytes more."""
    head = file.read(197)
    size = next((size for size, at in ((188, 0), (192, 4)) if head[at : at + 1] == head[at + size :][:1] == b"\x47"), 1)
    return -(-n_bytes // size) * size


_ENDS: dict[str, Callable[[BinaryIO, int], int]] = {
    "mov": _mov_end,
    "matroska": _matroska_end,
    "avi": _avi_end,
    "mpegts": _mpegts_end,
}
