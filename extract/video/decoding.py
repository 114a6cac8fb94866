"""Frames of one video file, by PyAV: those that its clips show, whole and undamaged, or an error.

A video is read twice: once for the times of its frames, once to decode. Decoding begins at the key frame before a
wanted frame and skips the groups of pictures that show none. Frames come upright (the rotation of phones is applied) as
8-bit RGB, whatever the source's depth; pixels that are not square are left as coded, as decord and torchvision do.

What is refused: a file that ends before its container says; a packet or frame that FFmpeg flags as corrupt; whatever it
calls an error, told to stop at errors rather than to paint over them; a wanted frame that never comes. This cannot find
all damage: codecs have no checksums, and changed bytes may decode to other valid pixels. Of 100 real H.264 clips with
one byte of their data changed at random 79 were refused or unharmed, with two 94, with four or eight all; MPEG-2 and
MPEG-4 are alike, but of HEVC, VP8 and VP9 with eight bytes changed most were decoded to wrong frames. The content's
digest, kept in the store, finds every change after extraction.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from jaxtyping import UInt8

from extract.video.clips import Sampling, frame_at
from extract.video.containers import FORMATS, BadVideoError, check_whole
from extract.video.timeline import OutOfOrderError, Run, Timeline, read_timeline

av.logging.set_level(av.logging.ERROR)  # PyAV is deaf by default

Frames = UInt8[np.ndarray, "frames height width 3"]

_MAX_PIXELS = 89_478_485  # a frame, as Pillow's limit for images
_MAX_BYTES = 4 * 2**30  # all frames of one video
_OPEN = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}  # a list of other files is no video
# `careful` and stricter found no more of the damage above, but reject healthy files of unusual encoders.
_DECODE = {"err_detect": "explode+crccheck+bitstream+buffer", "max_pixels": str(_MAX_PIXELS)}


def read_frames(
    path: str, sampling: Sampling, start: Fraction | None, end: Fraction | None
) -> tuple[Frames, list[list[int]]]:
    """The frames that the clips show, each once in order of time, and clip by clip their indices.

    Args:
        path: a file.
        start, end: seconds after the first frame between which clips are drawn; None is the video's own.

    Raises:
        BadVideoError, av.FFmpegError: no video, a damaged one, or one that ends before `start`.
        OSError: the file cannot be read.
    """
    if not os.path.getsize(path):  # noqa: PTH202 (the path is text in this process)
        raise BadVideoError("it holds no bytes")
    with _open(path) as (container, stream):
        check_whole(path, container.format.name)
        timeline = read_timeline(container, stream, end)
    try:
        return _read(path, timeline, sampling, start, end)
    except OutOfOrderError:
        with _open(path) as (container, stream):
            timeline = read_timeline(container, stream, None, counted=True)
        return _read(path, timeline, sampling, start, end)


def _read(
    path: str, timeline: Timeline, sampling: Sampling, start: Fraction | None, end: Fraction | None
) -> tuple[Frames, list[list[int]]]:
    clips = _choose(timeline, sampling, start, end)
    wanted = sorted({index for clip in clips for index in clip})
    place = {index: k for k, index in enumerate(wanted)}
    return _decode(path, timeline, wanted), [[place[index] for index in clip] for clip in clips]


def _choose(timeline: Timeline, sampling: Sampling, start: Fraction | None, end: Fraction | None) -> list[list[int]]:
    """Clip by clip, indices into the timeline."""
    start, end = start or Fraction(0), timeline.seconds if end is None else min(end, timeline.seconds)
    if start >= timeline.seconds:
        raise BadVideoError(f"it is {float(timeline.seconds):g} s long, but its part starts at {float(start):g} s")
    first, tick = timeline.ticks[0], timeline.tick
    return [
        [frame_at(timeline.ticks, first + moment / tick, first + end / tick) for moment in clip]
        for clip in sampling.moments(start, end, timeline.rate)
    ]


def _decode(path: str, timeline: Timeline, wanted: Sequence[int]) -> Frames:
    runs = timeline.runs(wanted)
    if runs[0].first > 0 or len(runs) > 1:
        try:
            return _decode_runs(path, timeline, wanted, runs)
        except (BadVideoError, av.FFmpegError):
            pass  # perhaps no damage: an open group of pictures refers to the one before it
    return _decode_runs(path, timeline, wanted, [Run(0, runs[-1].last)])


def _decode_runs(path: str, timeline: Timeline, wanted: Sequence[int], runs: Sequence[Run]) -> Frames:
    rows = {index: row for row, index in enumerate(wanted)}
    frames: Frames | None = None
    with _open(path) as (container, stream):
        for index, frame in timeline.number(_frames(container, stream, timeline, runs)):
            if index in rows:
                image = _upright(frame)
                frames = _allocate(len(wanted), image) if frames is None else frames
                frames[rows.pop(index)] = _same_size(image, frames)
    if frames is None or rows:
        raise BadVideoError(f"the decoder gave no frame for {float(timeline.seconds_at(min(rows))):g} s")
    return frames


def _frames(
    container: InputContainer, stream: VideoStream, timeline: Timeline, runs: Sequence[Run]
) -> Iterator[VideoFrame]:
    """The frames of the packets of each run, in the order in which they are shown."""
    decoder = stream.codec_context
    packets = enumerate(container.demux(stream))
    for run in runs:
        last = run.last
        for place, packet in packets:
            if place >= run.first and packet.size:  # an empty packet would end the decoder's work
                frames = decoder.decode(packet)
                if place == run.first and not frames:
                    last = timeline.last_to_check(run.last)
                yield from map(_sound, frames)
            if place == last:
                break
        yield from map(_sound, decoder.decode(None))  # what it still held
        decoder.flush_buffers()


def _sound(frame: VideoFrame) -> VideoFrame:
    if frame.is_corrupt:
        raise BadVideoError(f"its data are damaged at {frame.time or 0:g} s")
    return frame


def _upright(frame: VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
    quarter_turns = round(frame.rotation / 90)  # counter-clockwise
    return np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)


def _allocate(count: int, image: UInt8[np.ndarray, "height width 3"]) -> Frames:
    if count * image.nbytes > _MAX_BYTES:
        raise BadVideoError(
            f"{count} frames of {image.shape[1]} x {image.shape[0]} pixels exceed {_MAX_BYTES >> 30} GiB; "
            "take fewer clips or frames, or shrink it"
        )
    return np.empty((count, *image.shape), np.uint8)


def _same_size(image: UInt8[np.ndarray, "height width 3"], frames: Frames) -> UInt8[np.ndarray, "height width 3"]:
    if image.shape != frames.shape[1:]:
        raise BadVideoError("its frames have several sizes")
    return image


@contextmanager
def _open(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first video stream that is more than a cover picture, ready to be decoded by one thread.

    What FFmpeg calls an error meanwhile is one: demuxers go on after damage that they report in no other way.
    """
    with av.logging.Capture() as said:
        try:
            container = av.open(f"file:{path}", options=_OPEN)
        except (av.InvalidDataError, av.EOFError, av.ArgumentError) as error:
            why = f" ({said[-1][2].strip()})" if said else ""
            raise BadVideoError(f"it is damaged, or no video in a known format ({', '.join(FORMATS)}){why}") from error
        with container:
            yield container, _video_stream(container)
    if said:
        raise BadVideoError(f"it is damaged: {said[0][2].strip()}")


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise BadVideoError("it holds no video")
    stream = streams[0]
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        raise BadVideoError("its codec is unknown")
    if decoder.width * decoder.height > _MAX_PIXELS:
        raise BadVideoError(f"its frames have more than {_MAX_PIXELS} pixels, the limit against decompression bombs")
    decoder.options = dict(_DECODE)
    decoder.thread_count = 1
    return stream
