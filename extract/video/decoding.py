"""Decodes the frames of a video file that its clips show, with PyAV, or refuses the file; no frame is ever made up.

A video is read twice: first for the times of its frames, then to decode. Decoding begins at the key frame before a
wanted frame and skips groups of pictures without wanted frames. Frames are upright (the rotation of phones is applied)
and have 8-bit RGB, for any depth of the source; pixels that are not square are left as coded, as in decord and
torchvision.

Refused are: a file that ends before its container says; a packet or frame that FFmpeg flags as corrupt; everything that
FFmpeg logs as an error, with its options set to stop at errors instead of concealing them; and a wanted frame that the
decoder does not output. This cannot find all damage: codecs have no checksums, and changed bytes may decode to other
valid pixels. Of 100 real H.264 clips with one byte of their data changed at random, 79 were refused or unharmed, with
two bytes 94, with four or eight all. MPEG-2 and MPEG-4 behave alike, but of HEVC, VP8 and VP9 with eight bytes changed
most were decoded to wrong frames. The content's digest in the store finds every change after extraction.
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

from extract.video.clip_sampling import Sampling, frame_at
from extract.video.containers import FORMATS, BadVideoError, check_not_truncated
from extract.video.timeline import OutOfOrderError, PacketRange, Timeline, read_timeline

av.logging.set_level(av.logging.ERROR)  # by default PyAV logs nothing

Frames = UInt8[np.ndarray, "frames height width 3"]
Clips = list[list[int]]  # for each clip, the indices of its frames

_MAX_PIXELS = 89_478_485  # of a frame: Pillow's limit for images
_MAX_BYTES = 4 * 2**30  # of all frames of a video
_OPEN_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}  # playlists are refused
# `careful` and stricter settings found no more of the damage above, but refuse healthy files of unusual encoders.
_DECODER_OPTIONS = {"err_detect": "explode+crccheck+bitstream+buffer", "max_pixels": str(_MAX_PIXELS)}


def read_frames(path: str, sampling: Sampling, start: Fraction | None, end: Fraction | None) -> tuple[Frames, Clips]:
    """Decode the frames that the clips show.

    Args:
        path: a file.
        sampling: how the clips are drawn.
        start: seconds after the first frame at which the clips may begin; None for the start of the video.
        end: seconds after the first frame at which the clips end; None for the end of the video.

    Returns:
        The frames, each once, in order of time; and for each clip, the indices of its frames.

    Raises:
        BadVideoError, av.FFmpegError: the file is not a video, is damaged, or ends before `start`.
        OSError: the file cannot be read.
    """
    if not os.path.getsize(path):  # noqa: PTH202 (a worker has the path as text)
        raise BadVideoError("it is empty")
    with _open(path) as (container, stream):
        check_not_truncated(path, container.format.name)
        timeline = read_timeline(container, stream, end)
    try:
        return _decode_clips(path, timeline, _choose(timeline, sampling, start, end))
    except OutOfOrderError:  # the times are wrong: count the frames instead
        with _open(path) as (container, stream):
            timeline = read_timeline(container, stream, None, is_counted=True)
        return _decode_clips(path, timeline, _choose(timeline, sampling, start, end))


def _choose(timeline: Timeline, sampling: Sampling, start: Fraction | None, end: Fraction | None) -> Clips:
    """For each clip, indices of frames in the timeline."""
    start, end = start or Fraction(0), timeline.seconds if end is None else min(end, timeline.seconds)
    if start >= timeline.seconds:
        raise BadVideoError(f"it is {float(timeline.seconds):g} s long, but its part starts at {float(start):g} s")
    first_pts, time_base = timeline.pts[0], timeline.time_base
    return [
        [frame_at(timeline.pts, first_pts + time / time_base, first_pts + end / time_base) for time in clip]
        for clip in sampling.timestamps(start, end, timeline.rate)
    ]


def _decode_clips(path: str, timeline: Timeline, clips: Clips) -> tuple[Frames, Clips]:
    wanted = sorted({index for clip in clips for index in clip})
    row_of = {index: row for row, index in enumerate(wanted)}
    return _decode(path, timeline, wanted), [[row_of[index] for index in clip] for clip in clips]


def _decode(path: str, timeline: Timeline, wanted: Sequence[int]) -> Frames:
    ranges = timeline.packet_ranges(wanted)
    if ranges[0].first > 0 or len(ranges) > 1:
        try:
            return _decode_ranges(path, timeline, wanted, ranges)
        except (BadVideoError, av.FFmpegError):
            pass  # may be no damage: an open group of pictures refers to the previous one, so decode from the start
    return _decode_ranges(path, timeline, wanted, [PacketRange(0, ranges[-1].last)])


def _decode_ranges(path: str, timeline: Timeline, wanted: Sequence[int], ranges: Sequence[PacketRange]) -> Frames:
    row_of = {index: row for row, index in enumerate(wanted)}
    frames: Frames | None = None
    with _open(path) as (container, stream):
        for index, frame in timeline.number(_frames(container, stream, timeline, ranges)):
            if index in row_of:
                image = _upright(frame)
                frames = _allocate(len(wanted), image) if frames is None else frames
                frames[row_of.pop(index)] = _same_size(image, frames)
    if frames is None or row_of:
        raise BadVideoError(f"the decoder gave no frame for {float(timeline.seconds_at(min(row_of))):g} s")
    return frames


def _frames(
    container: InputContainer, stream: VideoStream, timeline: Timeline, ranges: Sequence[PacketRange]
) -> Iterator[VideoFrame]:
    """The frames of the packets of each range, in the order in which they are shown."""
    decoder = stream.codec_context
    packets = enumerate(container.demux(stream))
    for packet_range in ranges:
        last = packet_range.last
        for index, packet in packets:
            if index >= packet_range.first and packet.size:  # an empty packet would end the stream
                frames = decoder.decode(packet)
                if index == packet_range.first and not frames:
                    last = timeline.last_to_check(packet_range.last)
                yield from map(_require_sound, frames)
            if index == last:
                break
        yield from map(_require_sound, decoder.decode(None))  # frames that it still holds
        decoder.flush_buffers()


def _require_sound(frame: VideoFrame) -> VideoFrame:
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
            "take fewer clips or frames, or scale it down"
        )
    return np.empty((count, *image.shape), np.uint8)


def _same_size(image: UInt8[np.ndarray, "height width 3"], frames: Frames) -> UInt8[np.ndarray, "height width 3"]:
    if image.shape != frames.shape[1:]:
        raise BadVideoError("its frames have several sizes")
    return image


@contextmanager
def _open(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first video stream that is not a cover picture, to be decoded by one thread.

    Everything that FFmpeg logs as an error is raised at the end: some demuxers only log damage and go on.
    """
    with av.logging.Capture() as logs:
        try:
            container = av.open(f"file:{path}", options=_OPEN_OPTIONS)
        except (av.InvalidDataError, av.EOFError, av.ArgumentError) as error:
            details = f" ({logs[-1][2].strip()})" if logs else ""
            raise BadVideoError(
                f"it is damaged, or not a video in a known format ({', '.join(FORMATS)}){details}"
            ) from error
        with container:
            yield container, _video_stream(container)
    if logs:
        raise BadVideoError(f"it is damaged: {logs[0][2].strip()}")


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise BadVideoError("it holds no video stream")
    stream = streams[0]
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        raise BadVideoError("its codec is unknown")
    if decoder.width * decoder.height > _MAX_PIXELS:
        raise BadVideoError(f"its frames have more than {_MAX_PIXELS} pixels, the limit against decompression bombs")
    decoder.options = dict(_DECODER_OPTIONS)
    decoder.thread_count = 1
    return stream
