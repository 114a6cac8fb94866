"""In every container and codec that PyAV can write, a timestamp shows the frame that a player would show then.

Each frame shows its number. The frames of a clip are compared with the times that were written, with a plain decoding
from start to end, and with decord. Packets without a new frame are distinguished from damage.
"""

import os
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from video_files import RATE, all_frames, copy_packets, number_of, numbered, write_video

from extract.video.clip_sampling import Sampling
from extract.video.containers import BadVideoError
from extract.video.decoding import read_frames

COUNT = 40


def shown(path: Path, frames: int = COUNT, stride: int | None = None, **part: Any) -> list[int]:
    """The numbers of the frames of one clip."""
    images, (clip,) = read_frames(str(path), Sampling(frames, stride, 1), **{"start": None, "end": None, **part})
    return [number_of(images[k]) for k in clip]


# --- every codec in every container

H264: dict[str, Any] = {"g": "10", "bf": "3"}
HEVC: dict[str, Any] = {"codec": "libx265", "x265-params": "log-level=none:keyint=10:bframes=3:pools=none"}
VP8: dict[str, Any] = {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "10", "g": "20"}
VP9: dict[str, Any] = {"codec": "libvpx-vp9", "auto-alt-ref": "1", "lag-in-frames": "25"}
AV1: dict[str, Any] = {"codec": "libsvtav1", "preset": "8", "svtav1-params": "lp=1"}
MPEG4: dict[str, Any] = {"codec": "mpeg4", "b_frames": 2}
MPEG2: dict[str, Any] = {"codec": "mpeg2video", "b_frames": 2}
MPEG2_P: dict[str, Any] = {"codec": "mpeg2video", "b_frames": 0}  # the decoder delays frames nevertheless
MJPEG: dict[str, Any] = {"codec": "mjpeg", "pixels": "yuvj420p"}
WMV: dict[str, Any] = {"codec": "wmv2"}

FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "H.264": (H264, "mp4 mov mkv avi ts m2ts flv 3gp"),
    "HEVC": (HEVC, "mp4 mkv ts"),
    "VP8": (VP8, "webm mkv ogv avi"),
    "VP9": (VP9, "webm mkv mp4"),
    "AV1": (AV1, "webm mkv mp4"),
    "MPEG-4": (MPEG4, "mp4 mov mkv avi ts mpg"),
    "MPEG-4 without B-frames": (MPEG4 | {"b_frames": 0}, "mp4 avi"),
    "MPEG-2": (MPEG2, "mp4 mkv avi ts mpg"),
    "MPEG-2 without B-frames": (MPEG2_P, "mp4 mkv avi ts mpg"),
    "MPEG-1": ({"codec": "mpeg1video", "b_frames": 2}, "mpg"),
    "MJPEG": (MJPEG, "mov mkv avi"),
    "WMV1": ({"codec": "wmv1"}, "wmv avi"),
    "WMV2": (WMV, "wmv avi"),
    "MS-MPEG-4": ({"codec": "msmpeg4"}, "wmv avi mkv"),
    "Sorenson": ({"codec": "flv"}, "flv"),
    "Screen video": ({"codec": "flashsv", "pixels": "bgr24"}, "flv"),
    "H.263": ({"codec": "h263", "size": (128, 96)}, "3gp avi"),
    "FFV1": ({"codec": "ffv1"}, "mkv"),
    "Huffyuv": ({"codec": "huffyuv", "pixels": "yuv422p"}, "avi"),
    "ProRes": ({"codec": "prores", "pixels": "yuv422p10le"}, "mov"),
    "Animation": ({"codec": "qtrle", "pixels": "rgb24"}, "mov"),
    "PNG": ({"codec": "png", "pixels": "rgb24"}, "mov"),
    "Cinepak": ({"codec": "cinepak", "pixels": "rgb24"}, "avi"),
    "DosBox": ({"codec": "zmbv", "pixels": "bgr0"}, "avi"),
}
CASES = [(codec, ending) for codec, (_, endings) in FORMATS.items() for ending in endings.split()]
OF_DECORD = [  # in other codecs and containers decord miscounts frames
    (codec, ending)
    for codec, ending in CASES
    if codec in ("H.264", "HEVC", "VP8", "VP9") and ending in ("mp4", "mov", "mkv", "webm")
]


def write(codec: str, ending: str, folder: Path, **options: Any) -> Path:
    settings = FORMATS[codec][0] | options
    if settings.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this PyAV has no {settings['codec']}")
    return write_video(folder / f"v.{ending}", COUNT, draw=numbered, **settings)


@pytest.mark.parametrize(("codec", "ending"), CASES)
def test_a_clip_shows_the_frames_of_its_moments(codec: str, ending: str, tmp_path: Path) -> None:
    path = write(codec, ending, tmp_path)
    assert [number_of(frame) for frame in all_frames(path)] == list(range(COUNT))
    assert shown(path) == list(range(COUNT))
    assert shown(path, 4) == [5, 15, 25, 35]
    assert shown(path, 4, stride=3) == [15, 18, 21, 24]
    assert shown(path, 2, start=Fraction(10, RATE), end=Fraction(30, RATE)) == [15, 25]


@pytest.mark.parametrize(("codec", "ending"), OF_DECORD)
def test_decord_gives_the_same_frames(codec: str, ending: str, tmp_path: Path) -> None:
    decord = pytest.importorskip("decord")
    path = write(codec, ending, tmp_path)
    frames = decord.VideoReader(str(path)).get_batch([5, 15, 25, 35]).asnumpy()
    assert [number_of(frame) for frame in frames] == shown(path, 4)


VARIABLE = [(codec, ending) for codec, ending in CASES if ending in ("mp4", "mov", "3gp", "mkv", "webm", "flv", "ts")]
TICKS = [k + 7 * (k >= 10) + 20 * (k >= 25) + 3 * (k >= 38) for k in range(COUNT)]  # ends at 70


@pytest.mark.parametrize(("codec", "ending"), VARIABLE)
@pytest.mark.parametrize("first", [0, 50])
def test_frames_of_unequal_length_are_shown_by_time_whatever_the_first_time_is(
    codec: str, ending: str, first: int, tmp_path: Path
) -> None:
    path = write(codec, ending, tmp_path, ticks=[first + tick for tick in TICKS])
    wanted = [bisect_right(TICKS, moment + 0.5) - 1 for moment in range(60)]
    assert shown(path, 60, end=Fraction(60, RATE)) == wanted


# --- packets with wrong times


def in_decoding_order(source: Path, target: Path) -> Path:
    """A copy whose packets have decoding times, as in AVI remuxed to MP4."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for place, packet in enumerate(p for p in given.demux(video=0) if p.size):
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, RATE), 1
            packet.pts = packet.dts = place
            made.mux(packet)
    return target


REORDERED = [(H264, "mp4 mov mkv flv ts"), (HEVC, "mp4 mkv ts"), (MPEG4, "mp4 mkv mov"), (MPEG2, "mp4 mkv")]


@pytest.mark.parametrize(("options", "ending"), [(codec, end) for codec, ends in REORDERED for end in ends.split()])
def test_frames_with_times_of_decoding_are_shown_in_their_own_order(
    options: dict[str, Any], ending: str, tmp_path: Path
) -> None:
    source = write_video(tmp_path / "source.mkv", COUNT, draw=numbered, **options)
    path = in_decoding_order(source, tmp_path / f"v.{ending}")
    assert [number_of(frame) for frame in all_frames(path)] == list(range(COUNT))
    assert shown(path) == list(range(COUNT))
    for number in range(COUNT):  # each alone, so that few frames are decoded in which times may run backwards
        assert shown(path, 1, start=Fraction(number, RATE), end=Fraction(number + 1, RATE)) == [number]
    assert shown(path, 4, stride=3) == [15, 18, 21, 24]


def test_few_more_frames_are_decoded_where_they_are_delayed_but_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.ts", 90, draw=numbered, g="30", sc_threshold="1000000000", **MPEG2_P)
    decoded = []
    monkeypatch.setattr("extract.video.decoding._require_sound", lambda frame: decoded.append(frame) or frame)
    for part, count in (({}, 30), ({"start": Fraction(31, RATE), "end": Fraction(32, RATE)}, 2 + 16)):
        decoded.clear()
        shown(path, 1, **part)
        assert len(decoded) == count


@pytest.mark.parametrize("doubled", [{5}, {5, 20, 30}, {7, 8, 9}])
def test_frames_of_the_same_time_are_told_by_their_number(doubled: set[int], tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mkv", COUNT, draw=numbered, codec="libvpx")
    path = tmp_path / "v.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for place, packet in enumerate(p for p in given.demux(video=0) if p.size):
            packet.stream, packet.time_base = stream, Fraction(1, RATE)
            packet.pts = packet.dts = place - (place in doubled)
            made.mux(packet)
    at = [place - (place in doubled) for place in range(COUNT)]
    assert shown(path) == [bisect_right(at, moment + 0.5) - 1 for moment in range(COUNT)]


@pytest.mark.parametrize(("name", "codec"), [("v.webm", "libvpx"), ("v.mkv", "libx264")])
def test_a_live_recording_needs_no_length(name: str, codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, COUNT, codec=codec, draw=numbered, file_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert shown(path) == list(range(COUNT))


@pytest.mark.parametrize(
    ("ending", "message"), [("h264", "not a video in a known format"), ("mpg", "its frames have no times")]
)
def test_h264_without_times_is_refused(ending: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadVideoError, match=message):
        shown(write_video(tmp_path / f"v.{ending}", COUNT, draw=numbered))


# --- packets without a new frame


START = b"\0\0\1\xb6"  # of a picture of MPEG-4


def not_coded(number: int) -> bytes:
    """A picture that is not coded, as XviD writes it for a frame that repeats the previous one."""
    bits = f"01 0 1 {number % RATE:05b} 1 0 01111".replace(" ", "")
    return START + int(bits, 2).to_bytes(2, "big") + b"\x7f"


REPEATS = {10, 11, 12, 25, 39}
SHOWN = [max(k for k in range(COUNT) if k <= place and k not in REPEATS) for place in range(COUNT)]


def repeating(folder: Path, ending: str, change: Callable[[int, bytes], bytes]) -> Path:
    """A copy of MPEG-4 with changed packets at the indices REPEATS; later packets still refer to them."""
    pictures = lambda count, *size: (frame for k, frame in enumerate(numbered(count, *size)))  # noqa: E731
    source = write_video(folder / f"source.{ending}", COUNT, draw=pictures, codec="mpeg4", b_frames=0, g="1")
    return copy_packets(
        source, folder / f"v.{ending}", lambda place, data: change(place, data) if place in REPEATS else data
    )


@pytest.mark.parametrize("ending", ["avi", "mp4", "mkv"])
def test_a_picture_that_is_not_coded_shows_the_one_before_for_longer(ending: str, tmp_path: Path) -> None:
    path = repeating(tmp_path, ending, lambda place, data: not_coded(place))
    assert shown(path) == SHOWN
    assert shown(path, 4) == [5, 15, 24, 35]
    assert shown(path, 1, start=Fraction(11, RATE), end=Fraction(13, RATE)) == [9]


def test_empty_packets_of_theora_show_the_frame_before_for_longer() -> None:
    # ffmpeg -f lavfi -i "testsrc=s=32x32:r=10:d=0.8,format=yuv420p,select='not(between(n,4,5))',fps=10"
    #   -g 64 -c:v libtheora -q:v 3 theora_repeats.ogv
    path = Path(__file__).with_name("theora_repeats.ogv")
    with av.open(str(path)) as container:
        assert [packet.size > 0 for packet in container.demux(video=0)] == [*b"\1\1\1\1\0\0\1\0\0"]
    images, (clip,) = read_frames(str(path), Sampling(8, None, 1), None, None)
    assert clip == [0, 1, 2, 3, 3, 3, 4, 4]
    assert len({image.tobytes() for image in images}) == 5


def test_dropped_frames_of_avi_show_the_one_before_for_longer(tmp_path: Path) -> None:
    """A dropped frame is a chunk without data."""
    path = repeating(tmp_path, "avi", lambda place, data: b"" if place < 39 else data)
    assert shown(path) == [*SHOWN[:39], 39]


@pytest.mark.parametrize("ending", ["avi", "flv", "webm"])
def test_vp9_may_hide_a_frame_and_show_one_again(ending: str, tmp_path: Path) -> None:
    source = write_video(tmp_path / f"source.{ending}", COUNT, codec="libvpx-vp9", draw=numbered, g="0")
    hidden, again = {7, 12}, {20}  # bit 1 shows a frame; 0x88 shows the reference of number 0, which is the last frame

    def change(place: int, data: bytes) -> bytes:
        return bytes([data[0] & ~0x02]) + data[1:] if place in hidden else b"\x88" if place in again else data

    path = copy_packets(source, tmp_path / f"v.{ending}", change)
    wanted = [place - (place in hidden | again) for place in range(COUNT)]
    assert shown(path) == wanted


@pytest.mark.parametrize("cut", [7, 40])
@pytest.mark.parametrize("ending", ["avi", "mp4", "mkv"])
def test_a_cut_picture_is_none_that_is_not_coded(ending: str, cut: int, tmp_path: Path) -> None:
    path = repeating(tmp_path, ending, lambda place, data: data[:cut])
    with pytest.raises((BadVideoError, av.FFmpegError)):
        shown(path)


@pytest.mark.parametrize("ending", ["avi", "mp4", "mkv"])
def test_a_picture_whose_bit_says_not_coded_but_that_has_data_is_damaged(ending: str, tmp_path: Path) -> None:
    def change(place: int, data: bytes) -> bytes:
        at = data.index(START) + 5  # after type, second, marker and time, which take ten bits
        return data[:at] + bytes([data[at] & ~0x20]) + data[at + 1 :] if place == 10 else data

    with pytest.raises(BadVideoError, match=r"gave no frame|the decoder gave 39"):
        shown(repeating(tmp_path, ending, change))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux has scheduling policies")
def test_encoding_a_video_leaves_the_tests_their_scheduling(tmp_path: Path) -> None:
    """SVT-AV1 gives a process of root the highest real-time priority, which would starve all that run beside it."""
    before = os.sched_getscheduler(0)
    write_video(tmp_path / "a.mp4", 2, **AV1)
    assert os.sched_getscheduler(0) == before
