"""A view shows exactly the frames of its timestamps, or the video is refused; and no video hangs a job."""

import os
import random
import signal
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import RATE, all_frames, copy_packets, drawn, spoiled, write_endless, write_video

from extract.config import ClipConfig
from extract.images.decode import DecodeError
from extract.sources.videos import DecodedVideo, Video, VideoDecoder
from extract.video import decoding
from extract.video import timeline as timelines
from extract.video.clip_sampling import Sampling, crop_boxes, frame_at
from extract.video.containers import BadVideoError
from extract.video.decoding import read_frames
from store.errors import JobError

EVERY = 40  # frames of the files here: a clip of as many frames, spread evenly, shows each once


def taken(path: Path, frames: int = EVERY, stride: int | None = None, clips: int = 1, **part: Any) -> list[list[Any]]:
    """The frames of each clip as arrays, decoded in this process."""
    images, shown = read_frames(str(path), Sampling(frames, stride, clips), **{"start": None, "end": None, **part})
    return [[images[k] for k in clip] for clip in shown]


def numbers(path: Path, reference: list[np.ndarray], **options: Any) -> list[list[int]]:
    """For each clip, the indices of its frames in the reference."""
    known = {frame.tobytes(): number for number, frame in enumerate(reference)}
    assert len(known) == len(reference)
    return [[known[frame.tobytes()] for frame in clip] for clip in taken(path, **options)]


# --- timestamps and crops


seconds = st.fractions(0, 100, max_denominator=1000)


@given(st.integers(1, 20), st.integers(1, 8), seconds, seconds.filter(bool))
def test_spread_moments_lie_in_the_middles_of_equal_parts(
    frames: int, clips: int, start: Fraction, length: Any
) -> None:
    moments = Sampling(frames, None, clips).timestamps(start, start + length, Fraction(25))
    for k, clip in enumerate(moments):
        for j, moment in enumerate(clip):
            assert moment == start + length * (j + Fraction(2 * k + 1, 2 * clips)) / frames
    merged = sorted(moment for clip in moments for moment in clip)  # together the clips are spread evenly too
    assert {b - a for a, b in pairwise(merged)} <= {length / frames / clips}


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 8), st.integers(1, 400))
def test_dense_clips_keep_their_stride_and_fill_the_video(frames: int, stride: int, clips: int, count: int) -> None:
    rate = Fraction(30000, 1001)
    clip_frames = [
        [int(moment * rate) for moment in clip]
        for clip in Sampling(frames, stride, clips).timestamps(Fraction(0), count / rate, rate)
    ]
    for clip in clip_frames:
        assert [b - a for a, b in pairwise(clip)] == [stride] * (frames - 1)
    room = max(0, count - (frames - 1) * stride - 1)
    wanted = [room // 2] if clips == 1 else [room * k // (clips - 1) for k in range(clips)]
    assert [clip[0] for clip in clip_frames] == wanted


@given(st.lists(st.integers(0, 50), min_size=1).map(sorted), seconds, seconds)
def test_a_moment_shows_the_last_frame_that_has_begun(ticks: list[int], tick: Fraction, end: Fraction) -> None:
    begun = [k for k, at in enumerate(ticks) if at <= tick and at < end]
    assert frame_at(ticks, tick, end) == (begun[-1] if begun else 0)


@given(st.integers(1, 300), st.integers(1, 300))
def test_three_crops_are_squares_along_the_longer_side(width: int, height: int) -> None:
    boxes = crop_boxes(width, height, 3)
    side = min(width, height)
    assert all((right - left, bottom - top) == (side, side) for left, top, right, bottom in boxes)
    assert boxes[0][:2] == (0, 0)
    assert boxes[2][2:] == (width, height)
    assert abs(sum(boxes[1][:2]) * 2 - sum(boxes[2][:2])) <= 1
    assert crop_boxes(width, height, 1) == [(0, 0, width, height)]


# --- the frames shown

CODECS = {
    "h264.mp4": {},
    "short_groups.mp4": {"g": "7"},
    "open_groups.ts": {"g": "8", "x264-params": "open-gop=1:bframes=3"},
    "open_groups.mp4": {"g": "8", "x264-params": "open-gop=1:bframes=3"},
    "no_key_frames.mp4": {"g": "8", "intra-refresh": "1"},
    "fragments.mp4": {"g": "8", "file_options": {"movflags": "frag_keyframe+empty_moov"}},
    "quicktime.mov": {},
    "phone.3gp": {},
    "matroska.mkv": {"g": "10"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "b_frames.avi": {},  # its packets have wrong times
    "xvid.avi": {"codec": "mpeg4", "b_frames": 2},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "stream.ts": {"g": "10"},
    "mpeg4.mp4": {"codec": "mpeg4", "b_frames": 2, "g": "9"},
    "flash.flv": {},
    "media.wmv": {"codec": "wmv2"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:pools=none"},
}


@pytest.mark.parametrize("name", CODECS)
def test_every_frame_of_every_format_is_found_and_is_that_of_a_plain_decoding(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, **CODECS[name])  # type: ignore[arg-type]
    reference = all_frames(path)
    assert numbers(path, reference) == [list(range(EVERY))]
    assert numbers(path, reference, frames=4) == [[5, 15, 25, 35]]
    assert numbers(path, reference, frames=2, clips=2) == [[5, 25], [15, 35]]
    assert numbers(path, reference, frames=3, stride=4, clips=3) == [[0, 4, 8], [15, 19, 23], [31, 35, 39]]


def test_a_program_stream_without_a_time_for_every_packet_is_decoded_by_count(tmp_path: Path) -> None:
    path = write_video(tmp_path / "m.mpg", codec="mpeg2video", b_frames=2)
    reference = all_frames(path)
    shown = numbers(path, reference)[0]
    assert (shown[0], shown[-1]) == (0, EVERY - 1)
    assert shown == sorted(shown)


def pack_b_frames(packets: list[bytes]) -> list[bytes]:
    """Pack them as DivX did in AVI: each B frame with the previous frame, then a picture that is not coded."""
    start = b"\0\0\1\xb6"
    kinds = [data[data.index(start) + 4] >> 6 for data in packets]  # 2 is a B frame
    at = packets[0].index(start)
    packed = [packets[0][:at] + b"\0\0\1\xb2DivX503b1393p" + packets[0][at:]]
    for place, (kind, data) in enumerate(zip(kinds, packets, strict=True)):
        if kind == 2:
            packed += [packets[place - 1] + data, start + b"\x50\x4f"]
        elif place and kinds[place + 1 :][:1] != [2]:
            packed.append(data)
    return packed


def test_packed_b_frames_of_old_avi_files_are_shown_in_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", codec="mpeg4", b_frames=1, g="12", sc_threshold="1000000000")
    with av.open(str(path)) as container:
        packed = pack_b_frames([bytes(packet) for packet in container.demux(video=0) if packet.size])
    made = copy_packets(path, tmp_path / "packed.avi", lambda place, data: packed[place])
    assert len(packed) == EVERY
    assert numbers(made, all_frames(path)) == [list(range(EVERY))]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frames_of_unequal_length_are_taken_by_time(ending: str, tmp_path: Path) -> None:
    ticks = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 41, 42, 70, 90, 99]
    path = write_video(tmp_path / f"v.{ending}", len(ticks), ticks=ticks)
    moments = [(j + 0.5) * 10 for j in range(10)]  # of 100 ticks
    wanted = [bisect_right(ticks, moment) - 1 for moment in moments]
    assert numbers(path, all_frames(path), frames=10) == [wanted]


def test_a_matroska_clip_of_stride_one_shows_each_frame_once_though_times_are_rounded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", 90, rate=30)  # 33.33 ms in whole milliseconds
    for clip, start in zip(numbers(path, all_frames(path), frames=30, stride=1, clips=3), (0, 30, 60), strict=True):
        assert clip == list(range(start, start + 30))


@pytest.mark.parametrize("ending", ["mp4", "avi", "ts"])
def test_a_part_shows_frames_of_that_part_alone(ending: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"v.{ending}", 100, g="10")
    reference = all_frames(path)
    part = {"start": Fraction(2), "end": Fraction(3)}  # frames 50 to 74
    assert numbers(path, reference, frames=5, **part) == [[52, 57, 62, 67, 72]]
    assert numbers(path, reference, frames=30, stride=1, **part) == [[*range(50, 75), *[74] * 5]]
    assert numbers(path, reference, frames=2, start=Fraction(3)) == [[81, 93]]
    assert numbers(path, reference, frames=2, end=Fraction(1)) == [[6, 18]]
    assert numbers(path, reference, frames=1, end=Fraction(100)) == [[50]]
    with pytest.raises(BadVideoError, match=r"it is 4 s long, but its part starts at 4 s"):
        taken(path, start=Fraction(4))


def test_a_clip_longer_than_its_video_shows_the_last_frame_again(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 5)
    assert numbers(path, all_frames(path), frames=8, stride=2, clips=2) == [[0, 2, 4, 4, 4, 4, 4, 4]] * 2
    assert numbers(path, all_frames(path), frames=10) == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize("name", ["one.mp4", "one.avi", "one.mkv", "one.ts"])
def test_a_video_of_one_frame_shows_it_always(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, 1)
    assert numbers(path, all_frames(path), frames=3, clips=2) == [[0, 0, 0]] * 2
    assert numbers(path, all_frames(path), frames=3, stride=2) == [[0, 0, 0]]


def test_frames_that_an_edit_list_cuts_off_are_not_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", b_frames=0)
    whole, content = all_frames(path), bytearray(path.read_bytes())
    at = content.index(b"elst") + 16  # version and flags, number of entries, length, then the time it begins
    content[at : at + 4] = (10 * 512).to_bytes(4, "big")
    path.write_bytes(content)
    assert numbers(path, whole, frames=30) == [list(range(10, 40))]


def hide_vp8(path: Path, hidden: set[int]) -> Path:
    """A copy in which the frames of these numbers are only references, never shown."""
    change = {True: lambda data: bytes([data[0] & ~0x10]) + data[1:], False: lambda data: data}
    return copy_packets(path, path.with_stem("hidden"), lambda place, data: change[place in hidden](data))


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.webm", codec="libvpx")
    shown = [k for k in range(EVERY) if k not in {7, 20}]
    wanted = [max(k for k in shown if k <= place) for place in range(EVERY)]
    assert numbers(hide_vp8(path, {7, 20}), all_frames(path)) == [wanted]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3), (0, 0)])
def test_the_rotation_of_phones_is_applied(degrees: int, turns: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 4, setup=lambda stream: stream.set_display_rotation(degrees))
    for frame, coded in zip(taken(path, 4)[0], all_frames(path), strict=True):
        assert np.array_equal(frame, np.rot90(coded, turns))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd.mp4", {"size": (37, 23), "pixels": "yuv444p"}),
        ("odd.webm", {"size": (37, 23), "codec": "libvpx-vp9"}),
        ("deep.mp4", {"pixels": "yuv420p10le"}),
        ("gray.mp4", {"pixels": "gray"}),
        ("lossless.mkv", {"codec": "ffv1", "pixels": "bgr0"}),
        (
            "wide_pixels.mp4",
            {"setup": lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(4, 3))},
        ),
    ],
)
def test_any_size_and_depth_becomes_8_bit_rgb_of_the_coded_size(name: str, options: Any, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, 6, **options)
    width, height = options.get("size", (64, 48))
    for frame, original in zip(taken(path, 6)[0], drawn(6, width, height), strict=True):
        assert frame.dtype == np.uint8
        assert frame.shape == (height, width, 3)
        colors = "gray" if "gray" in name else "rgb24"
        assert np.abs(frame.mean((0, 1)) - original.to_ndarray(format=colors).mean((0, 1))).max() < 12


# --- files that are no videos, or damaged ones


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


NO_VIDEOS = {
    "nothing": (lambda path: path.touch(), "it is empty"),
    "text": (lambda path: path.write_text("no video\n" * 100), "not a video in a known format"),
    "playlist": (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "not a video in a known format"),
    "concat": (lambda path: path.write_text("ffconcat version 1.0\nfile a.mp4\n"), "not a video in a known format"),
    "image": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "not a video in a known format"),
    "gif": (lambda path: Image.new("RGB", (8, 8)).save(path, "GIF"), "not a video in a known format"),
    "audio": (write_audio, "it holds no video stream"),
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = NO_VIDEOS[kind]
    path = tmp_path / "v.mp4"
    make(path)
    with pytest.raises(BadVideoError, match=message):
        taken(path)


@pytest.mark.parametrize("share", [0.3, 0.75, 0.98])
@pytest.mark.parametrize("name", ["last.mp4", "first.mp4", "fragments.mp4", "v.mkv", "v.avi", "v.ts"])
def test_a_truncated_file_is_refused(name: str, share: float, tmp_path: Path) -> None:
    flags = {"first.mp4": "faststart", "fragments.mp4": "frag_keyframe+empty_moov"}.get(name)
    path = write_video(tmp_path / name, g="10", file_options={"movflags": flags} if flags else None)
    content = path.read_bytes()
    cut = int(len(content) * share) // 188 * 188 + 100  # within a packet, where a cut is noticed
    path.write_bytes(content[:cut])
    with pytest.raises(BadVideoError, match=r"truncated|damaged"):
        taken(path, frames=1)  # which needs a frame of the first part alone


def test_a_file_with_fewer_frames_than_its_index_promises_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", file_options={"movflags": "faststart"})
    content = bytearray(path.read_bytes()[:-1500])
    at = content.index(b"mdat") - 4
    content[at : at + 4] = (len(content) - at).to_bytes(4, "big")  # as a careless repair does
    path.write_bytes(content)
    with pytest.raises(BadVideoError, match=r"its index promises 40 packets, but it holds|damaged or cut off"):
        taken(path, frames=1)


def test_a_stream_with_a_gap_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts", codec="mpeg2video", b_frames=0)
    content = path.read_bytes()
    gap = len(content) // 376 * 188
    path.write_bytes(content[:gap] + content[gap + 188 :])
    with pytest.raises((BadVideoError, av.FFmpegError)):
        taken(path)


def test_a_frame_that_the_decoder_leaves_out_is_not_replaced_by_another(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_video(tmp_path / "v.webm", codec="libvpx")
    made = hide_vp8(path, {20})
    monkeypatch.setattr(timelines, "frame_counter", lambda stream: lambda packet: 1)
    assert len(taken(made, frames=2, end=Fraction(15, RATE))[0]) == 2  # what comes before it is sound
    with pytest.raises(BadVideoError, match=r"the decoder gave no frame for 0\.8 s"):
        taken(made)


@pytest.mark.parametrize(("n_bytes", "least"), [(1, 0.5), (4, 0.9), (16, 1.0), (64, 1.0)])
def test_changed_bytes_are_refused_or_harmless(n_bytes: int, least: float, tmp_path: Path) -> None:
    """A changed byte may give other valid data; `least` is the share of changes that must be refused or harmless."""
    path = write_video(tmp_path / "v.mp4", size=(128, 96), g="20")
    content, healthy = path.read_bytes(), all_frames(path)
    draw, safe, trials = random.Random(n_bytes), 0, 60
    for _ in range(trials):
        path.write_bytes(spoiled(content, n_bytes, draw))
        try:
            safe += all(map(np.array_equal, taken(path)[0], healthy))
        except (BadVideoError, av.FFmpegError):
            safe += 1
    assert safe / trials >= least


def test_frames_beyond_the_limits_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_video(tmp_path / "v.mp4")
    monkeypatch.setattr(decoding, "_MAX_BYTES", 9 * 64 * 48 * 3)
    assert len(taken(path, 9)[0]) == 9
    with pytest.raises(BadVideoError, match=r"10 frames of 64 x 48 pixels exceed .*take fewer clips or frames"):
        taken(path, 10)
    monkeypatch.setattr(decoding, "_MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadVideoError, match="more than 3071 pixels, the limit against decompression bombs"):
        taken(path)


# --- workers


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    return write_endless(folder / "endless.mkv", folder / "small.mkv")


@pytest.fixture
def service() -> Iterator[VideoDecoder]:
    made = VideoDecoder()
    yield made
    made.pool.close()


def video(path: Path, **clips: Any) -> Video:
    return Video(str(path), ClipConfig(**clips))


def processes(service: VideoDecoder) -> list[psutil.Process]:
    return [psutil.Process(worker._process.pid) for worker in service.pool._workers if worker._process is not None]


def test_views_are_squares_of_the_clips_frames_and_share_one_decoding(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_video(tmp_path / "v.mp4", size=(64, 32))
    requests = []
    ask = VideoDecoder._decode
    monkeypatch.setattr(VideoDecoder, "_decode", lambda *args: requests.append(args[2]) or ask(*args))
    views = [replace(video(path, frames=4, clips=2, crops=3), view=view) for view in range(6)]
    with ThreadPoolExecutor(6) as pool:
        clips = list(pool.map(lambda view: view.decode(f"a/v.mp4#{view.view}"), views))
    assert requests == ["a/v.mp4"]
    reference = all_frames(path)
    for view, clip in enumerate(clips):
        first, left = (2, 7)[view // 3], (0, 16, 32)[view % 3]
        for frame, number in zip(clip, range(first, EVERY, 10), strict=True):
            assert (frame.mode, frame.size) == ("RGB", (32, 32))
            assert np.array_equal(np.asarray(frame), reference[number][:, left : left + 32])


def test_all_views_of_a_damaged_video_fail_alike_and_name_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes()[:500])
    views = [replace(video(path, clips=3), view=view) for view in range(3)]
    messages = set()
    for view in views:
        with pytest.raises(DecodeError, match=r"sample 'a/v\.mp4' cannot be decoded: .*data\.on_error: skip") as caught:
            view.decode(f"a/v.mp4#{view.view}")
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_a_file_that_went_away_is_a_failure_and_no_damaged_sample(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"sample 'v\.mp4' cannot be read from .*/v\.mp4: No such file"):
        video(tmp_path / "v.mp4").decode("v.mp4")


def test_only_the_last_few_videos_are_kept(tmp_path: Path, service: VideoDecoder) -> None:
    for number in range(12):
        path = write_video(tmp_path / f"{number}.mp4", 2)
        service.decode(video(path, frames=1), "v")
    assert len(service._recent) == 4


def test_a_video_in_decoding_is_not_forgotten_for_those_that_come_after_it(
    service: VideoDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, started, go_on = video(Path("slow.mp4")), threading.Event(), threading.Event()
    asked: list[Video] = []

    def decode(service: VideoDecoder, video: Video, name: str) -> DecodedVideo:
        asked.append(video)
        if video == slow:
            started.set()
            go_on.wait(10)
        return DecodedVideo(np.zeros((1, 1, 1, 3), np.uint8), [[0]])

    monkeypatch.setattr(VideoDecoder, "_decode", decode)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(service.decode, slow, "slow")
        started.wait(10)
        for number in range(6):
            service.decode(video(Path(f"{number}.mp4")), "v")
        second = pool.submit(service.decode, slow, "slow")
        go_on.set()
        assert first.result() is second.result()
    assert asked.count(slow) == 1


def test_an_endless_video_ends_at_its_time_limit_and_others_go_on(
    endless: Path, tmp_path: Path, service: VideoDecoder
) -> None:
    healthy = write_video(tmp_path / "v.mp4")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(service.decode, video(endless, time_limit=0.5), "endless")
        quick = [pool.submit(service.decode, video(healthy, frames=k), "v") for k in (1, 2, 3)]
        assert [len(future.result().frames) for future in quick] == [1, 2, 3]
        with pytest.raises(DecodeError, match=r"sample 'endless' cannot be decoded: it took longer than 0\.5 s"):
            slow.result()
    assert len(service.decode(video(healthy, frames=4), "v").frames) == 4


@contextmanager
def killing(service: VideoDecoder, number: int, times: int) -> Iterator[None]:
    """Send a signal to `times` workers, each after it has decoded for a moment."""

    def kill() -> None:
        killed = set[int]()
        while len(killed) < times and not stop.wait(0.02):
            for process in processes(service):
                if process.pid not in killed and process.cpu_times().user > 0.8:
                    process.send_signal(number)
                    killed.add(process.pid)

    stop = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_worker_that_is_killed_by_chance_is_replaced(endless: Path, service: VideoDecoder) -> None:
    with killing(service, signal.SIGKILL, times=1):
        assert len(service.decode(video(endless, frames=4, time_limit=600), "v").frames) == 4


def test_a_video_that_kills_its_workers_is_damaged_and_others_go_on(
    endless: Path, tmp_path: Path, service: VideoDecoder
) -> None:
    message = (
        r"sample 'v' cannot be decoded: the process that decoded it died \(SIGKILL\), perhaps because memory ran out"
    )
    with killing(service, signal.SIGKILL, times=2), pytest.raises(DecodeError, match=message):
        service.decode(video(endless, time_limit=600), "v")
    assert len(service.decode(video(write_video(tmp_path / "v.mp4"), frames=3), "v").frames) == 3


def test_an_interrupted_worker_is_no_damaged_sample(endless: Path, service: VideoDecoder) -> None:
    with (
        killing(service, signal.SIGINT, times=1),
        pytest.raises(JobError, match="the decoding of videos was interrupted"),
    ):
        service.decode(video(endless, time_limit=600), "endless")


def test_workers_are_replaced_after_many_answers(tmp_path: Path, service: VideoDecoder, monkeypatch: Any) -> None:
    monkeypatch.setattr("extract.video.process_pool._MAX_ANSWERS", 2)
    path = write_video(tmp_path / "v.mp4", 2)
    used = []
    for frames in range(1, 6):
        service.decode(video(path, frames=frames), "v")
        used += [process.pid for process in processes(service)]
    assert len(set(used)) == 3
    assert len(used) == 5  # one at a time: the replaced worker is gone


SCRIPT = """\
import sys
from extract.config import ClipConfig
from extract.sources.videos import Video
clip = Video({path!r}, ClipConfig(frames=3)).decode("v.mp4")
print(len(clip), "torch" in sys.modules)
"""


def run_script(script: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *options.pop("flags", []), script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_script_without_a_main_guard_ends_cleanly_and_in_silence(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=str(path)))
    process = run_script(str(script), flags=["-X", "dev", "-W", "error"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "3 False\n", "")


def test_ffmpeg_and_its_libraries_print_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    path.write_bytes(spoiled(path.read_bytes(), 64, random.Random(0)))
    script = tmp_path / "script.py"
    script.write_text(
        f"import contextlib\nwith contextlib.suppress(Exception):\n{indent(SCRIPT.format(path=str(path)), ' ')}"
    )
    assert run_script(str(script)).communicate(timeout=60) == ("", "")


def test_a_worker_imports_no_torch() -> None:
    code = "import sys, extract.video.decode_process; print({'torch', 'PIL', 'pydantic'} & sys.modules.keys())"
    assert run_script(code, flags=["-c"]).communicate(timeout=60) == ("set()\n", "")


def test_ctrl_c_ends_the_job_and_its_workers_at_once(endless: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('begun', flush=True)\n" + SCRIPT.format(path=str(endless)))
    process = run_script(str(script), start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    parent = psutil.Process(process.pid)
    while not any(child.cpu_times().user > 0.6 for child in parent.children()):
        assert process.poll() is None
    workers = parent.children()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)  # well before the time limit of 60 s
    assert process.returncode != 0
    assert psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    assert len(video(path, frames=2).decode("v")) == 2
    child = os.fork()
    if child == 0:
        os._exit(0 if len(video(path, frames=3).decode("v")) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(video(path, frames=4).decode("v")) == 4


# --- real clips


def real_clips(real_data: Path) -> list[Path]:
    clips = sorted((real_data / "videos/drone_vs_bird_cc0").glob("*/*.mp4"))
    if not clips:
        pytest.skip("the real clips are not here")
    return clips


def test_frames_of_real_clips_equal_those_of_decord(real_data: Path) -> None:
    decord = pytest.importorskip("decord")
    for path in real_clips(real_data)[::20]:
        reader = decord.VideoReader(str(path))
        (clip,) = taken(path, frames=8)
        wanted = [int((j + 0.5) * len(reader) / 8) for j in range(8)]
        assert np.array_equal(np.stack(clip), reader.get_batch(wanted).asnumpy())
