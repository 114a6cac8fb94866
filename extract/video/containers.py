"""Finds out whether a video file is shorter than its container says: FFmpeg does not report every truncated file.

The lengths are parsed here because no library was found that knows them all: MediaInfo (24.12, `IsTruncated`) does not
notice that a WMV, FLV or Ogg file is truncated, and calls complete live recordings in Matroska truncated.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "asf", "flv", "ogg")  # FFmpeg's names
EXTENSIONS = frozenset(  # without .gif, which is an image here
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
)

_REQUIRED_BOXES = (b"moov", b"mdat", b"moof")
_SEGMENT = b"\x18\x53\x80\x67"
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # a GUID
_ASF_HEADER_BYTES = 1 << 16  # more than the headers of ASF that come before the properties
_MAX_OGG_PAGE = 65_307  # bytes
_AUDIO, _VIDEO, _SCRIPT = 8, 9, 18  # types of FLV tags


class BadVideoError(Exception):
    """A file is not a video, or a damaged one; the message has "it" as the subject."""


def check_not_truncated(path: str, format_name: str) -> None:
    """Refuse a file that is shorter than its container says.

    docs/video.md lists the containers in which a cut between two parts cannot be noticed.

    Args:
        path: a file.
        format_name: FFmpeg's name of the container.

    Raises:
        BadVideoError: the file is truncated.
    """
    n_bytes = os.path.getsize(path)  # noqa: PTH202 (a worker has the path as text)
    with Path(path).open("rb") as file:
        expected = next((find_end(file, n_bytes) for name, find_end in _FIND_END.items() if name in format_name), 0)
    if expected > n_bytes:
        raise BadVideoError(f"it is truncated: it has {n_bytes} bytes, but its container says {expected}")


def _mov_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last box of data or of headers ends."""
    end = position = 0
    while position + 8 <= n_bytes:
        file.seek(position)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        if size < 8:  # 0 means up to the end of the file; other values are no box
            break
        position += size
        if kind in _REQUIRED_BOXES:
            end = position
    return end


def _matroska_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the first segment ends or, if its length is unknown as in a live recording, where its last element ends."""
    end = 0
    while (identifier := _matroska_number(file)) and (size := _matroska_number(file)):
        unknown = (1 << 7 * len(size)) - 1
        value = int.from_bytes(size, "big") & unknown
        if value == unknown:
            continue  # its elements follow
        end = file.tell() + value
        if identifier == _SEGMENT:
            break
        file.seek(end)
    return end


def _matroska_number(file: BinaryIO) -> bytes:
    """The bytes of an identifier or a size; the number of leading zero bits gives their count."""
    first = file.read(1)
    return first + file.read(8 - first[0].bit_length()) if first.strip(b"\0") else b""


def _avi_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last RIFF chunk ends: files above 1 GB have several. A stream has the length 0 or all ones."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF" and head[4:] != b"\xff" * 4:
        end = file.tell() + int.from_bytes(head[4:], "little")
        file.seek(end + end % 2)
    return end


def _asf_end(file: BinaryIO, n_bytes: int) -> int:
    """The file's size in the header, which a broadcast does not have."""
    head = file.read(_ASF_HEADER_BYTES)
    at = head.find(_ASF_PROPERTIES)
    is_broadcast = head[at + 88 : at + 89] in (b"\1", b"\3")
    return 0 if at < 0 or is_broadcast else int.from_bytes(head[at + 40 : at + 48], "little")


def _flv_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last tag ends, or the file's size in the metadata if it is larger."""
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
        position += 4  # the tag's length, repeated
    return end


def _flv_file_size(metadata: bytes) -> int:
    _, found, value = metadata.partition(b"\0\x08filesize\0")
    return int(struct.unpack(">d", value[:8])[0]) if found and len(value) >= 8 else 0


def _ogg_end(file: BinaryIO, n_bytes: int) -> int:
    """Where the last page ends, which must be marked as the end of its stream (RFC 3533, 6)."""
    start = file.seek(max(0, n_bytes - _MAX_OGG_PAGE))
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
    """The next multiple of a packet's length. Each packet begins with 0x47, in M2TS after 4 more bytes."""
    head = file.read(197)
    size = next((size for size, at in ((188, 0), (192, 4)) if head[at : at + 1] == head[at + size :][:1] == b"\x47"), 1)
    return -(-n_bytes // size) * size


_FIND_END: dict[str, Callable[[BinaryIO, int], int]] = {
    "mov": _mov_end,
    "matroska": _matroska_end,
    "avi": _avi_end,
    "mpegts": _mpegts_end,
    "asf": _asf_end,
    "flv": _flv_end,
    "ogg": _ogg_end,
}
