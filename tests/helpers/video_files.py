"""Makes video files with PyAV's encoders, in which all frames differ, and damages them."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 25


def drawn(count: int, width: int = 64, height: int = 48) -> Iterator[av.VideoFrame]:
    """Frames with texture, a moving bar and a changing shade; no two frames are the same."""
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    for number in range(count):
        pixels = noise + np.array([number * 3 % 150, 40, 150 - number * 3 % 150])
        pixels[:, (number * 3) % width] = 255
        yield av.VideoFrame.from_ndarray(np.roll(pixels, number, axis=0).astype(np.uint8), format="rgb24")


def numbered(count: int, width: int = 64, height: int = 48) -> Iterator[av.VideoFrame]:
    """Frames that show their number, below 256, as eight black or white fields, which survive any codec."""
    for number in range(count):
        bits = np.array([(number >> bit & 1) * 255 for bit in range(8)], np.uint8).reshape(2, 4)
        fields = bits.repeat(height // 2, axis=0).repeat(width // 4, axis=1)
        yield av.VideoFrame.from_ndarray(np.repeat(fields[..., None], 3, axis=2), format="rgb24")


def number_of(image: np.ndarray) -> int:
    """The number that a frame of `numbered` shows; `image` is (height, width, 3)."""
    height, width = image.shape[0] // 2, image.shape[1] // 4
    fields = image.mean(axis=2).reshape(2, height, 4, width)[:, height // 4 : -height // 4, :, width // 4 : -width // 4]
    return sum(int(level > 127) << bit for bit, level in enumerate(fields.mean(axis=(1, 3)).ravel()))


def write_video(
    path: Path,
    count: int = 40,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    ticks: Sequence[int] | None = None,
    rate: int = RATE,
    b_frames: int | None = None,
    file_options: dict[str, str] | None = None,
    setup: Callable[[Any], None] = lambda stream: None,
    draw: Callable[[int, int, int], Iterator[av.VideoFrame]] = drawn,
    **options: str,
) -> Path:
    """Write a file in the container of its extension; `ticks` are the frames' times in units of 1 / `rate` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"threads": "1", **options}
    with _same_scheduling(), av.open(str(path), "w", options=file_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        setup(stream)
        for number, frame in enumerate(draw(count, *size)):
            frame.pts, frame.time_base = ticks[number] if ticks else number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@contextmanager
def _same_scheduling() -> Iterator[None]:
    """Leave the thread's scheduling as it is: SVT-AV1 takes the highest real-time priority where it may (as root)."""
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def copy_packets(source: Path, target: Path, change: Callable[[int, bytes], bytes | None], times: int = 1) -> Path:
    """Copy the packets to another file, `times` times; `change` returns the bytes of each, None to drop it."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        length = sum(packet.duration for packet in packets)
        for turn in range(times):
            for index, packet in enumerate(packets):
                if (data := change(index, bytes(packet))) is not None:
                    copy = av.Packet(data)
                    copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                    copy.pts, copy.duration = packet.pts + turn * length, packet.duration
                    copy.dts = None if packet.dts is None else packet.dts + turn * length
                    writer.mux(copy)
    return target


def write_endless(path: Path, small: Path) -> Path:
    """A healthy file of 200,000 tiny frames: quick to write, but decoding it exceeds every time limit in the tests."""
    write_video(small, 500, size=(16, 16), b_frames=0, preset="ultrafast", tune="zerolatency")
    return copy_packets(small, path, lambda index, data: data, times=400)


def all_frames(path: Path) -> list[np.ndarray]:
    """All frames, as PyAV decodes them from the first to the last: (height, width, 3) each."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def media_bytes(content: bytes) -> tuple[int, int]:
    """Start and end of the data of an MP4 file."""
    start = content.index(b"mdat") + 4
    return start, start - 8 + int.from_bytes(content[start - 8 : start - 4], "big")


def spoiled(content: bytes, n_bytes: int, draw: random.Random) -> bytes:
    """The content of an MP4 file with `n_bytes` random bytes of its data changed."""
    damaged, (start, end) = bytearray(content), media_bytes(content)
    for offset in draw.sample(range(start, end), n_bytes):
        damaged[offset] ^= draw.randrange(1, 256)
    return bytes(damaged)
