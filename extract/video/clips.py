"""Which moments of a video its clips show, and which parts of a frame: arithmetic alone, without decoding.

Moments are exact fractions of a second after the first frame. A moment shows the last frame that begins at or before
it, so frames of unequal length are right too. Where a clip is longer than what it is drawn from, the last frame is
shown again, as is usual in the field; of a video of one frame, every clip shows that frame.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

VERSION = 2  # raise it when a change here, or in how frames are decoded, changes what a view shows

_HALF = Fraction(1, 2)
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Sampling:
    """Clips of `frames` frames: spread over the whole if `stride` is None, else `stride` frames apart (mean rate)."""

    frames: int
    stride: int | None
    clips: int

    def moments(self, start: Fraction, end: Fraction, rate: Fraction) -> list[list[Fraction]]:
        """Seconds of the frames of every clip, drawn from [start, end) of a video of `rate` frames a second."""
        if self.stride is None:
            return [self._spread(k, start, end) for k in range(self.clips)]
        return [self._dense(k, self.stride, start, end, rate) for k in range(self.clips)]

    def _spread(self, clip: int, start: Fraction, end: Fraction) -> list[Fraction]:
        """One moment in each of `frames` equal parts: the middle; of several clips, each its own place in the part."""
        part, place = (end - start) / self.frames, (clip + _HALF) / self.clips
        return [start + (j + place) * part for j in range(self.frames)]

    def _dense(self, clip: int, stride: int, start: Fraction, end: Fraction, rate: Fraction) -> list[Fraction]:
        """The first clip begins at `start` and the last ends at `end`; a single clip lies in the middle.

        Clips begin a whole number of frames after `start` and moments are the middles of frames, so that timestamps
        rounded to milliseconds, as Matroska's are, cannot show one frame twice and miss the next.
        """
        room = max(Fraction(0), (end - start) * rate - (self.frames - 1) * stride - 1)  # frames
        begin = int(room * (Fraction(clip, self.clips - 1) if self.clips > 1 else _HALF))
        return [start + (begin + j * stride + _HALF) / rate for j in range(self.frames)]


def frame_at(ticks: Sequence[int], tick: Fraction, end: Fraction) -> int:
    """Index of the last frame that begins at or before `tick` and before `end`; the first where none does.

    Args:
        ticks: when the frames begin, in order.
        tick: the moment, in the same unit.
        end: where what may be shown ends.
    """
    return max(0, min(bisect_right(ticks, tick), bisect_left(ticks, end)) - 1)


def crop_boxes(width: int, height: int, crops: int) -> list[Box]:
    """The whole frame, or three squares of the short side: at both ends of the long side and in its middle."""
    if crops == 1:
        return [(0, 0, width, height)]
    side = min(width, height)
    spare = max(width, height) - side
    offsets = (0, spare // 2, spare)
    if width >= height:
        return [(offset, 0, offset + side, side) for offset in offsets]
    return [(0, offset, side, offset + side) for offset in offsets]
