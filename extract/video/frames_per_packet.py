"""Counts the new frames that a packet adds, from the syntax of its codec; one for every codec that is not handled here.

A packet may hold a reference frame that is never shown, or say that nothing changed: then the previous frame is shown
for longer. For such packets FFmpeg gives neither a frame nor an error, as it does for some damage, so only the packet
shows the difference.
"""

import re
from collections.abc import Callable

from av import Packet
from av.video.stream import VideoStream

FrameCounter = Callable[["Packet[VideoStream]"], int]

_LAYER, _PICTURE = b"\0\0\1[\x20-\x2f]", b"\0\0\1\xb6"  # MPEG-4's video object layer (VOL) and plane (VOP)
_START = re.compile(b"(%b)|%b" % (_LAYER, _PICTURE), re.DOTALL)
_MAX_NOT_CODED = 16  # bytes of a picture that is not coded: a time and a few bits


def frame_counter(stream: VideoStream) -> FrameCounter:
    """A function that counts the new frames of a packet; it must be called with the stream's packets in order."""
    codec = stream.codec_context
    counters: dict[str, FrameCounter] = {"vp8": _vp8, "libvpx": _vp8, "vp9": _vp9, "libvpx-vp9": _vp9}
    if codec.name == "mpeg4":
        count: FrameCounter = _Mpeg4(codec.extradata or b"")
    else:
        count = counters.get(codec.name, lambda packet: 1)
    return lambda packet: count(packet) if packet.size else 0  # Theora and AVI repeat a frame with an empty packet


def _vp8(packet: "Packet[VideoStream]") -> int:
    """Bit 4 of the header is set if the frame is shown (RFC 6386, 9.1)."""
    return memoryview(packet)[0] >> 4 & 1


def _vp9(packet: "Packet[VideoStream]") -> int:
    """A superframe ends with a shown frame; a single frame has a bit for it (VP9 bitstream, 6.2, annex B)."""
    data = memoryview(packet)
    if data[-1] & 0xE0 == 0xC0:
        return 1
    is_profile_3 = data[0] & 0x30 == 0x30  # which has one more bit
    shows_existing, shows = data[0] << is_profile_3 & 0x08, data[0] << is_profile_3 & 0x02
    return int(bool(shows_existing or shows))


class _Mpeg4:
    """MPEG-4 part 2 has pictures that are not coded (ISO 14496-2, 6.2.5); DivX put two into a packet of AVI."""

    def __init__(self, header: bytes) -> None:
        self._clock_bits: int | None = None
        self._count(memoryview(header))

    def __call__(self, packet: "Packet[VideoStream]") -> int:
        return self._count(memoryview(packet))

    def _count(self, data: memoryview) -> int:
        coded = []
        starts = list(_START.finditer(data))
        ends = [start.start() for start in starts[1:]] + [len(data)]
        for start, end in zip(starts, ends, strict=False):  # `starts` may be empty
            bits = _Bits(data[start.end() : start.end() + 32])
            if start[1]:
                self._clock_bits = _clock_bits(bits)
            else:  # a picture marked as not coded that has more data is a coded one, damaged
                coded.append(end - start.end() > _MAX_NOT_CODED or self._is_coded(bits))
        return sum(coded) if coded else 1  # a packet without a VOP is a short header of H.263

    def _is_coded(self, bits: "_Bits") -> bool:
        if self._clock_bits is None:
            return True
        bits.skip(2)  # the type of picture
        while bits.read(1):  # seconds since the previous one
            pass
        bits.skip(1 + self._clock_bits + 1)  # ticks of the clock, between markers
        return bool(bits.read(1))


def _clock_bits(bits: "_Bits") -> int:
    """Number of bits of the time within a second, from a VOL's header (ISO 14496-2, 6.2.3)."""
    bits.skip(1 + 8)  # random access, type of object
    version = bits.read(4) if (has_version := bits.read(1)) else 1
    bits.skip(3 * has_version)  # priority
    if bits.read(4) == 15:  # the pixel aspect ratio follows
        bits.skip(16)
    if bits.read(1):
        bits.skip(3)  # chroma format, low delay
        bits.skip(79 * bits.read(1))  # buffering
    if bits.read(2) == 3 and version != 1:  # a grayscale shape
        bits.skip(4)
    bits.skip(1)  # a marker
    return max(1, (bits.read(16) - 1).bit_length())


class _Bits:
    """Reads numbers bit by bit, most significant bit first; after the end of the data it reads zeros."""

    def __init__(self, data: memoryview) -> None:
        self._left, self._value = 8 * len(data), int.from_bytes(data, "big")

    def read(self, count: int) -> int:
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << count) - 1)

    def skip(self, count: int) -> None:
        self._left -= count
