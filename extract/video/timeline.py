"""When the frames of a video begin, and which packets it takes to decode some of them: no pixels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from av import Packet, VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from extract.video.containers import BadVideoError
from extract.video.frames_in_packet import Counter, frame_counter

_MAX_DELAY = 16  # frames that a decoder holds back: the limit of H.264 and HEVC, and the most of any codec


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

    `number` raises OutOfOrderError where the times turn out to be those of decoding: then a timeline that is counted is
    right, since a decoder gives frames in the order in which they are shown.
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

    def last_to_check(self, place: int) -> int:
        """The last packet whose frames `number` must see before the time of that at `place` can be trusted.

        For a decoder that holds frames back, which it does to change their order. If the times tell of no other order,
        they may be those of decoding: then some frames among the next few run backwards.
        """
        if any(b < a for a, b in pairwise(self.places)):
            return place
        return min([place + _MAX_DELAY, *(key - 1 for key, _ in self.keys if key > place)])

    def number(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int | None, VideoFrame]]:
        """Each decoded frame with its index; None for one that is not in the timeline."""
        if self.counted:
            yield from self._count(frames)
            return
        index, last = {tick: k for k, tick in enumerate(self.ticks)}, -math.inf
        for frame in frames:
            if frame.pts is None:
                yield None, frame
                continue
            if frame.pts < last:
                raise OutOfOrderError
            last = frame.pts
            yield index.get(last), frame

    def _count(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
        count = 0
        for frame in frames:
            yield count, frame
            count += 1
        if count != len(self.ticks):
            raise BadVideoError(f"it holds {len(self.ticks)} frames, but the decoder gave {count}")


class OutOfOrderError(Exception):
    """The times of the packets are not those of the frames: only the order in which the decoder gives them is known."""


class _Stamp(NamedTuple):
    """What is kept of a packet."""

    place: int
    tick: int
    duration: int
    is_key: bool
    n_frames: int  # new ones that it brings to show


def read_timeline(
    container: InputContainer, stream: VideoStream, stop: Fraction | None, counted: bool = False
) -> Timeline:
    """Read the packets' times, up to `stop` seconds after the first frame where that is given.

    Args:
        counted: tell the frames by their number, as where `Timeline.number` raised OutOfOrderError.

    Raises:
        BadVideoError: there are no frames, a packet is corrupt, or packets of the container's index are missing.
    """
    clock: Any = stream.time_base  # a Fraction or None up to PyAV 18, a class of its own since
    if clock is None:
        raise BadVideoError("its stream does not say in what unit its times are")
    tick = Fraction(clock.numerator, clock.denominator)
    reader = _Stamps(counted or container.format.name == "avi", frame_counter(stream))
    cut = reader.read(container.demux(stream), None if stop is None else stop / tick)
    if cut is None and len(reader.stamps) < len(stream.index_entries):
        raise BadVideoError(
            f"its index promises {len(stream.index_entries)} packets, but it holds {len(reader.stamps)}"
        )
    return reader.timeline(tick, cut)


class _Stamps:
    """The stamps of a stream's packets, in its order, and whether their times name the frames."""

    def __init__(self, counted: bool, count_frames: Counter) -> None:
        self.stamps: list[_Stamp] = []
        self._counted, self._count_frames = counted, count_frames
        self._ticks: set[int] = set()  # of the frames shown
        self._first = math.inf  # of these

    def read(self, packets: "Iterable[Packet[VideoStream]]", stop: Fraction | None) -> int | None:
        """Read all, or until no later packet can be shown before `stop` ticks after the first frame: that tick."""
        for place, packet in enumerate(packets):
            tick = packet.dts if packet.pts is None else packet.pts
            if tick is None:
                if packet.size:
                    raise BadVideoError("its frames have no times")
                continue  # PyAV's mark of the end
            self._add(place, packet, tick)
            if stop is not None and not self._counted and packet.dts is not None:
                end = self._first + stop
                if packet.dts >= end:
                    return math.ceil(end)
        return None

    def _add(self, place: int, packet: "Packet[VideoStream]", tick: int) -> None:
        if packet.is_corrupt:
            raise BadVideoError(f"its data are damaged or cut off at {float(tick * packet.time_base):g} s")
        n_frames = 0 if packet.is_discard else self._count_frames(packet)
        if n_frames:
            self._counted |= packet.pts is None or tick in self._ticks or n_frames > 1
            self._ticks.add(tick)
            self._first = min(self._first, tick)
        duration = 0 if packet.is_discard else packet.duration or 0
        self.stamps.append(_Stamp(place, tick, duration, packet.is_keyframe, n_frames))

    def timeline(self, tick: Fraction, cut: int | None) -> Timeline:
        shown = sorted((s.tick, s.place, s.duration) for s in self._shown())
        if cut is not None:
            shown = [entry for entry in shown if entry[0] < cut]
        if not shown:
            raise BadVideoError("it holds no frames")
        ticks = [entry[0] for entry in shown]
        # Without a duration of its own, as in ASF, the last frame is as long as the mean of the others.
        end = ticks[-1] + max(1, shown[-1][2] or (ticks[-1] - ticks[0]) // max(1, len(ticks) - 1))
        repeats = (s.tick + s.duration for s in self.stamps if not s.n_frames and s.duration)
        end = max([end, *repeats])
        keys = [(s.place, s.tick) for s in self.stamps if s.is_key]
        return Timeline(tick, ticks, [e[1] for e in shown], keys, end if cut is None else cut, self._counted)

    def _shown(self) -> Iterator[_Stamp]:
        """The packets whose times are those of frames. A second frame of one has that of the next that brings none."""
        waiting, stamp = 0, None
        for stamp in self.stamps:
            waiting += stamp.n_frames
            if waiting:
                waiting -= 1
                yield stamp
        for later in range(1, waiting + 1):
            assert stamp is not None
            yield stamp._replace(tick=stamp.tick + later * max(1, stamp.duration))
