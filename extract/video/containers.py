"""Container formats of videos, and whether a file is as long as its container says: FFmpeg is silent if it is not."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "asf", "flv", "ogg")  # FFmpeg's names
ENDINGS = frozenset(  # not gif, which is an image here
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
)

_MUST_FIT = (b"moov", b"mdat", b"moof")
_SEGMENT = b"\x18\x53\x80\x67"
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # a GUID
_HEADERS = 1 << 16  # bytes; more than the headers of ASF that come before the properties
_OGG_PAGE = 65_307  # bytes at most
_AUDIO, _VIDEO, _SCRIPT = 8, 9, 18  # kinds of tags of FLV


class BadVideoError(Exception):
    """A file is no video, or a damaged one; says what is wrong with "it"."""


def check_whole(path: str, format_name: str) -> None:
    """BadVideoError where the file is shorter than its container says.

    What a container does not tell is in docs/video.md: where a cut at the border of two of its parts cannot be known.
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
    """Where the first segment ends; if it is of unknown length, as of a live recording, where its last element does."""
    end = 0
    while (identifier := _matroska_number(file)) and (size := _matroska_number(file)):
        unknown = (1 << 7 * len(size)) - 1
        value = int.from_bytes(size, "big") & unknown
        if value == unknown:
            continue  # what it holds comes next
        end = file.tell() + value
        if identifier == _SEGMENT:
            break
        file.seek(end)
    return end


def _matroska_number(file: BinaryIO) -> bytes:
    """The bytes of an identifier or a size: the leading zero bits say how many there are."""
    first = file.read(1)
    return first + file.read(8 - first[0].bit_length()) if first.strip(b"\0") else b""


def _avi_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last RIFF chunk ends: files above 1 GB have several. A stream's length is 0 or all ones."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF" and head[4:] != b"\xff" * 4:
        end = file.tell() + int.from_bytes(head[4:], "little")
        file.seek(end + end % 2)
    return end


def _asf_end(file: BinaryIO, n_bytes: int) -> int:
    """The size that the header tells, which a broadcast does not know."""
    head = file.read(_HEADERS)
    at = head.find(_ASF_PROPERTIES)
    is_broadcast = head[at + 88 : at + 89] in (b"\1", b"\3")
    return 0 if at < 0 or is_broadcast else int.from_bytes(head[at + 40 : at + 48], "little")


def _flv_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last tag ends, or the file does by its metadata."""
    file.seek(5)
    position, end = int.from_bytes(file.read(4), "big") + 4, 0
    while position < n_bytes:
        file.seek(position)
        head = file.read(11)
        if head[0] & 0x1F not in (_AUDIO, _VIDEO, _SCRIPT):
            break
        size = int.from_bytes(head[1:4], "big")
        if head[0] == _SCRIPT and not end:
            end = _flv_file_size(file.read(size))
        position += 11 + size
        end = max(end, position)
        position += 4  # the tag's length again
    return end


def _flv_file_size(metadata: bytes) -> int:
    _, found, value = metadata.partition(b"\0\x08filesize\0")
    return int(struct.unpack(">d", value[:8])[0]) if found and len(value) >= 8 else 0


def _ogg_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last page ends, which must be marked as the end of its stream (RFC 3533, 6)."""
    start = file.seek(max(0, n_bytes - _OGG_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS")
    head = tail[at : at + 27]
    if at < 0 or len(head) < 27 or not head[5] & 4:
        raise BadVideoError(
            "it is truncated: its last page does not end a stream; if it was recorded so and is complete, remux it "
            "(ffmpeg -i IN.ogv -c copy OUT.ogv)"
        )
    return start + at + 27 + head[26] + sum(tail[at + 27 : at + 27 + head[26]])


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
    "asf": _asf_end,
    "flv": _flv_end,
    "ogg": _ogg_end,
}
