"""When the frames of a video begin, and which packets it takes to decode some of them: no pixels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from av import Packet, VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from extract.video.containers import BadVideoError


class Run(NamedTuple):
    """Packets from a key frame to the last that a wanted frame needs, both by their place in the stream."""

    first: int
    last: int


@dataclass(frozen=True)
class Timeline:
    """The frames that are shown, in order of time.

    Attributes:
        tick: seconds of one unit of time.
        ticks: when each frame begins.
        places: which packet holds it, by its place in the stream.
        keys: place and time of the key frames.
        end: when the last frame ends.
        counted: frames are known by their number alone, as in AVI, whose packets bear no usable times.
    """

    tick: Fraction
    ticks: list[int]
    places: list[int]
    keys: list[tuple[int, int]]
    end: int
    counted: bool

    @property
    def seconds(self) -> Fraction:
        return (self.end - self.ticks[0]) * self.tick

    @property
    def rate(self) -> Fraction:
        """Mean frames a second."""
        return len(self.ticks) / self.seconds

    def seconds_at(self, index: int) -> Fraction:
        """When a frame begins, after the first."""
        return (self.ticks[index] - self.ticks[0]) * self.tick

    def runs(self, wanted: Sequence[int]) -> list[Run]:
        """The packets to decode for the frames of these indices, in order and apart."""
        if self.counted:
            return [Run(0, max(self.places))]  # to the end: only a full count proves that no frame was left out
        runs: list[Run] = []
        for run in sorted(Run(self._key_before(index), self.places[index]) for index in wanted):
            if runs and run.first <= runs[-1].last:
                runs[-1] = Run(runs[-1].first, max(runs[-1].last, run.last))
            else:
                runs.append(run)
        return runs

    def _key_before(self, index: int) -> int:
        """The last key frame that comes before the frame both in the stream and when shown."""
        place, tick = self.places[index], self.ticks[index]
        return max((key for key, at in self.keys if key <= place and at <= tick), default=0)

    def number(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int | None, VideoFrame]]:
        """Each decoded frame with its index; None for one that is not in the timeline."""
        if not self.counted:
            index = {tick: k for k, tick in enumerate(self.ticks)}
            yield from ((None if frame.pts is None else index.get(frame.pts), frame) for frame in frames)
            return
        count = 0
        for frame in frames:
            yield count, frame
            count += 1
        if count != len(self.ticks):
            raise BadVideoError(f"it holds {len(self.ticks)} frames, but the decoder gave {count}")


class _Stamp(NamedTuple):
    """What is kept of a packet."""

    tick: int
    duration: int
    is_key: bool
    is_shown: bool


def read_timeline(container: InputContainer, stream: VideoStream, stop: Fraction | None) -> Timeline:
    """Read the packets' times, up to `stop` seconds after the first frame where that is given.

    Raises:
        BadVideoError: there are no frames, a packet is corrupt, or packets of the container's index are missing.
    """
    clock: Any = stream.time_base  # a Fraction or None up to PyAV 18, a class of its own since
    if clock is None:
        raise BadVideoError("its stream does not say in what unit its times are")
    tick = Fraction(clock.numerator, clock.denominator)
    reader = _Stamps(counted=container.format.name == "avi", hides=stream.codec_context.name in ("vp8", "libvpx"))
    cut = reader.read(container.demux(stream), None if stop is None else stop / tick)
    if cut is None and len(reader.stamps) < len(stream.index_entries):
        raise BadVideoError(
            f"its index promises {len(stream.index_entries)} packets, but it holds {len(reader.stamps)}"
        )
    return reader.timeline(tick, cut)


class _Stamps:
    """The stamps of a stream's packets, in its order, and whether their times name the frames."""

    def __init__(self, counted: bool, hides: bool) -> None:
        self.stamps: list[_Stamp] = []
        self._counted, self._hides = counted, hides
        self._ticks: set[int] = set()  # of the frames shown
        self._first = math.inf  # of these

    def read(self, packets: "Iterable[Packet[VideoStream]]", stop: Fraction | None) -> int | None:
        """Read all, or until no later packet can be shown before `stop` ticks after the first frame: that tick."""
        for packet in packets:
            tick = packet.dts if packet.pts is None else packet.pts
            if tick is None:
                if packet.size:
                    raise BadVideoError("its frames have no times")
                break  # PyAV's mark of the end
            self._add(packet, tick)
            if stop is not None and not self._counted and packet.dts is not None:
                end = self._first + stop
                if packet.dts >= end:
                    return math.ceil(end)
        return None

    def _add(self, packet: "Packet[VideoStream]", tick: int) -> None:
        if packet.is_corrupt:
            raise BadVideoError(f"its data are damaged or cut off at {float(tick * packet.time_base):g} s")
        is_shown = packet.size > 0 and not packet.is_discard and not (self._hides and _is_hidden_vp8(packet))
        if is_shown:
            self._counted |= packet.pts is None or tick in self._ticks
            self._ticks.add(tick)
            self._first = min(self._first, tick)
        self.stamps.append(_Stamp(tick, packet.duration or 0, packet.is_keyframe, is_shown))

    def timeline(self, tick: Fraction, cut: int | None) -> Timeline:
        shown = sorted((s.tick, place, s.duration) for place, s in enumerate(self.stamps) if s.is_shown)
        if cut is not None:
            shown = [entry for entry in shown if entry[0] < cut]
        if not shown:
            raise BadVideoError("it holds no frames")
        ticks = [entry[0] for entry in shown]
        # Without a duration of its own, as in ASF, the last frame is as long as the mean of the others.
        end = ticks[-1] + max(1, shown[-1][2] or (ticks[-1] - ticks[0]) // max(1, len(ticks) - 1))
        keys = [(place, s.tick) for place, s in enumerate(self.stamps) if s.is_key]
        return Timeline(tick, ticks, [e[1] for e in shown], keys, end if cut is None else cut, self._counted)


def _is_hidden_vp8(packet: "Packet[VideoStream]") -> bool:
    """A frame that VP8 decodes as a reference and never shows: bit 4 of the header is unset (RFC 6386, 9.1)."""
    return not memoryview(packet)[0] & 0x10
