"""Computes which moments of a video its clips show, and which parts of a frame the crops are; nothing is decoded here.

Timestamps are exact fractions of a second after the first frame. A timestamp shows the last frame that begins at or
before it, which is also right for a variable frame rate. If a clip is longer than the video, or the part of it that the
clip is drawn from, the last frame is repeated, as is usual in the field.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

VERSION = 2  # increase it with every change, here or in how frames are decoded, that changes the pixels of a view

_HALF = Fraction(1, 2)
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn from a video.

    Attributes:
        frames: of each clip.
        stride: distance of two frames of a clip, in frames of the mean rate; None spreads them over the whole video.
        clips: of each video.
    """

    frames: int
    stride: int | None
    clips: int

    def timestamps(self, start: Fraction, end: Fraction, rate: Fraction) -> list[list[Fraction]]:
        """The timestamps of every clip's frames, in seconds.

        Args:
            start: of the interval that the clips are drawn from, in seconds.
            end: of this interval, exclusive.
            rate: frames per second.
        """
        if self.stride is None:
            return [self._uniform(clip, start, end) for clip in range(self.clips)]
        # Clips begin a whole number of frames after `start`, and timestamps are the middles of frames. So timestamps
        # that were rounded to milliseconds, as Matroska's are, never show one frame twice and skip the next.
        room = max(Fraction(0), (end - start) * rate - (self.frames - 1) * self.stride - 1)  # frames
        first_frames = [int(room * self._position(clip)) for clip in range(self.clips)]
        return [
            [start + (first + j * self.stride + _HALF) / rate for j in range(self.frames)] for first in first_frames
        ]

    def _uniform(self, clip: int, start: Fraction, end: Fraction) -> list[Fraction]:
        """One timestamp in each of `frames` equal segments: its middle, or another point for each of several clips."""
        segment, offset = (end - start) / self.frames, (clip + _HALF) / self.clips
        return [start + (j + offset) * segment for j in range(self.frames)]

    def _position(self, clip: int) -> Fraction:
        """Where a clip lies between the first possible start (0) and the last (1); a single clip is in the middle."""
        return Fraction(clip, self.clips - 1) if self.clips > 1 else _HALF


def frame_at(frame_times: Sequence[int], time: Fraction, end: Fraction) -> int:
    """Index of the last frame that begins at or before `time` and before `end`; the first frame if there is none.

    Args:
        frame_times: when the frames begin, in order.
        time: in the same unit.
        end: no frame that begins here or later is shown.
    """
    return max(0, min(bisect_right(frame_times, time), bisect_left(frame_times, end)) - 1)


def crop_boxes(width: int, height: int, crops: int) -> list[Box]:
    """The whole frame, or three squares of the shorter side: at both ends of the longer side and in its middle."""
    if crops == 1:
        return [(0, 0, width, height)]
    side = min(width, height)
    room = max(width, height) - side
    offsets = (0, room // 2, room)
    if width >= height:
        return [(offset, 0, offset + side, side) for offset in offsets]
    return [(0, offset, side, offset + side) for offset in offsets]
