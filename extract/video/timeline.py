"""Reads when the frames of a video begin and which packets must be decoded to get some of them; decodes no pixels.

Times are presentation timestamps (pts), whole numbers of the stream's time base.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from av import Packet, VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from extract.video.containers import BadVideoError
from extract.video.frames_per_packet import FrameCounter, frame_counter

_MAX_DELAY = 16  # frames that a decoder holds back: the limit of H.264 and HEVC, and the most of any codec


class PacketRange(NamedTuple):
    """Packets from a key frame to the last one that a wanted frame needs, as indices of the stream's packets."""

    first: int
    last: int


class KeyFrame(NamedTuple):
    """A packet at which decoding may begin."""

    packet: int
    pts: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames that are shown, in order of time.

    `number` raises OutOfOrderError if the packets' times turn out to be decoding times. Then a timeline that is counted
    is right, because a decoder outputs frames in the order in which they are shown.

    Attributes:
        time_base: seconds of one unit of time.
        pts: when each frame begins.
        packets: the packet that holds each frame, as its index in the stream.
        key_frames: in the order of the stream.
        end: when the last frame ends.
        is_counted: whether frames can be identified only by counting, as in AVI, whose packets have no usable times.
    """

    time_base: Fraction
    pts: list[int]
    packets: list[int]
    key_frames: list[KeyFrame]
    end: int
    is_counted: bool

    @property
    def seconds(self) -> Fraction:
        """Length of the video."""
        return (self.end - self.pts[0]) * self.time_base

    @property
    def rate(self) -> Fraction:
        """Mean number of frames per second."""
        return len(self.pts) / self.seconds

    def seconds_at(self, index: int) -> Fraction:
        """When a frame begins, in seconds after the first."""
        return (self.pts[index] - self.pts[0]) * self.time_base

    def packet_ranges(self, wanted: Sequence[int]) -> list[PacketRange]:
        """The packets to decode for the frames of these indices, in order and without overlap."""
        if self.is_counted:
            return [PacketRange(0, max(self.packets))]  # all: only a full count proves that no frame is missing
        ranges: list[PacketRange] = []
        for start, end in sorted((self._key_frame_before(index), self.packets[index]) for index in wanted):
            if ranges and start <= ranges[-1].last:
                ranges[-1] = PacketRange(ranges[-1].first, max(ranges[-1].last, end))
            else:
                ranges.append(PacketRange(start, end))
        return ranges

    def _key_frame_before(self, index: int) -> int:
        """The packet of the last key frame that precedes the frame both in the stream and in time."""
        packet, pts = self.packets[index], self.pts[index]
        return max((key.packet for key in self.key_frames if key.packet <= packet and key.pts <= pts), default=0)

    def last_to_check(self, packet: int) -> int:
        """The last packet that `number` must see before the time of the frame of `packet` can be trusted.

        This is for a decoder that holds frames back, as it does to reorder them. If the packets' times show no
        reordering, they may be decoding times: then the times of some of the next few frames run backwards.
        """
        if any(after < before for before, after in pairwise(self.packets)):
            return packet
        return min([packet + _MAX_DELAY, *(key.packet - 1 for key in self.key_frames if key.packet > packet)])

    def number(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int | None, VideoFrame]]:
        """Each decoded frame with its index; None for one that is not in the timeline.

        Raises:
            OutOfOrderError: the packets' times are not those of the frames.
            BadVideoError: the timeline is counted, and the decoder gave another number of frames.
        """
        if self.is_counted:
            yield from self._count(frames)
            return
        index_of = {pts: index for index, pts in enumerate(self.pts)}
        last = -math.inf
        for frame in frames:
            if frame.pts is None:
                yield None, frame
                continue
            if frame.pts < last:
                raise OutOfOrderError
            last = frame.pts
            yield index_of.get(frame.pts), frame

    def _count(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
        count = 0
        for frame in frames:
            yield count, frame
            count += 1
        if count != len(self.pts):
            raise BadVideoError(f"it holds {len(self.pts)} frames, but the decoder gave {count}")


class OutOfOrderError(Exception):
    """The packets' times are not those of the frames, which can then be identified only by counting."""


def read_timeline(
    container: InputContainer, stream: VideoStream, stop: Fraction | None, is_counted: bool = False
) -> Timeline:
    """Read the times of a stream's packets.

    Args:
        container: the open file.
        stream: its video stream.
        stop: seconds after the first frame at which reading may end; None reads all packets.
        is_counted: identify the frames by counting, because `Timeline.number` raised OutOfOrderError.

    Raises:
        BadVideoError: there are no frames, a packet is corrupt, or packets in the container's index are missing.
    """
    clock: Any = stream.time_base  # None, or a Fraction up to PyAV 18 and later a class of PyAV
    if clock is None:
        raise BadVideoError("its stream has no time base")
    time_base = Fraction(clock.numerator, clock.denominator)
    reader = _PacketReader(is_counted or container.format.name == "avi", frame_counter(stream))
    cut = reader.read(container.demux(stream), None if stop is None else stop / time_base)
    if cut is None and len(reader.packets) < len(stream.index_entries):
        raise BadVideoError(f"its index has {len(stream.index_entries)} packets, but it holds {len(reader.packets)}")
    return reader.timeline(time_base, cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PacketInfo:
    """The properties of a packet that the timeline needs."""

    index: int
    pts: int
    duration: int
    is_key_frame: bool
    n_frames: int  # new frames that it adds


class _PacketReader:
    """Reads the packets of a stream in order, and whether their times identify the frames."""

    def __init__(self, is_counted: bool, count_frames: FrameCounter) -> None:
        self.packets: list[_PacketInfo] = []
        self._is_counted, self._count_frames = is_counted, count_frames
        self._shown_pts: set[int] = set()
        self._first_pts = math.inf

    def read(self, packets: "Iterable[Packet[VideoStream]]", stop: Fraction | None) -> int | None:
        """Read packets.

        Args:
            packets: of the stream.
            stop: units of time after the first frame; reading ends once no later packet can be shown before.

        Returns:
            The time at which reading ended; None if all packets were read.
        """
        for index, packet in enumerate(packets):
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is None:
                if packet.size:
                    raise BadVideoError("its frames have no times")
                continue  # PyAV ends a stream with an empty packet
            self._add(index, packet, pts)
            if stop is not None and not self._is_counted and packet.dts is not None:
                end = self._first_pts + stop
                if packet.dts >= end:
                    return math.ceil(end)
        return None

    def _add(self, index: int, packet: "Packet[VideoStream]", pts: int) -> None:
        if packet.is_corrupt:
            raise BadVideoError(f"its data are damaged or cut off at {float(pts * packet.time_base):g} s")
        n_frames = 0 if packet.is_discard else self._count_frames(packet)
        if n_frames:
            self._is_counted |= packet.pts is None or pts in self._shown_pts or n_frames > 1
            self._shown_pts.add(pts)
            self._first_pts = min(self._first_pts, pts)
        duration = 0 if packet.is_discard else packet.duration or 0
        self.packets.append(
            _PacketInfo(index=index, pts=pts, duration=duration, is_key_frame=packet.is_keyframe, n_frames=n_frames)
        )

    def timeline(self, time_base: Fraction, cut: int | None) -> Timeline:
        """The frames of the packets that were read; with `cut`, those that begin before it."""
        shown = sorted((packet.pts, packet.index, packet.duration) for packet in self._shown())
        if cut is not None:
            shown = [frame for frame in shown if frame[0] < cut]
        if not shown:
            raise BadVideoError("it holds no frames")
        pts = [frame[0] for frame in shown]
        return Timeline(
            time_base=time_base,
            pts=pts,
            packets=[frame[1] for frame in shown],
            key_frames=[KeyFrame(packet.index, packet.pts) for packet in self.packets if packet.is_key_frame],
            end=self._end(pts, shown[-1][2]) if cut is None else cut,
            is_counted=self._is_counted,
        )

    def _end(self, pts: Sequence[int], last_duration: int) -> int:
        """When the last frame ends; without a duration, as in ASF, it is as long as the mean of the others."""
        mean_duration = (pts[-1] - pts[0]) // max(1, len(pts) - 1)
        end = pts[-1] + max(1, last_duration or mean_duration)
        # packets without a new frame show the last one for longer
        repeats = (packet.pts + packet.duration for packet in self.packets if not packet.n_frames and packet.duration)
        return max([end, *repeats])

    def _shown(self) -> Iterator[_PacketInfo]:
        """A packet for each frame, with the frame's time.

        If a packet adds a second frame, this frame has the time of the next packet that adds none.
        """
        waiting, packet = 0, None
        for packet in self.packets:
            waiting += packet.n_frames
            if waiting:
                waiting -= 1
                yield packet
        for later in range(1, waiting + 1):
            assert packet is not None
            yield replace(packet, pts=packet.pts + later * max(1, packet.duration))
