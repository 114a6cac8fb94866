"""A truncated file is refused, except for cuts that cannot be noticed in its container, which are listed here."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from video_files import RATE, drawn, write_video

from extract.video.clip_sampling import Sampling
from extract.video.containers import BadVideoError
from extract.video.decoding import read_frames

COUNT = 120

CONTAINERS: dict[str, dict[str, Any]] = {
    "last.mp4": {},
    "first.mp4": {"file_options": {"movflags": "faststart"}},
    "fragments.mp4": {"file_options": {"movflags": "frag_keyframe+empty_moov"}},
    "quicktime.mov": {},
    "phone.3gp": {},
    "known.mkv": {},
    "live.mkv": {"file_options": {"live": "1", "cluster_time_limit": "1000"}},
    "known.webm": {"codec": "libvpx"},
    "live.webm": {"codec": "libvpx", "file_options": {"live": "1", "cluster_time_limit": "1000"}},
    "h264.avi": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "media.wmv": {"codec": "wmv2"},
    "h264.flv": {},
    "sorenson.flv": {"codec": "flv"},
    "vp8.ogv": {"codec": "libvpx", "file_options": {"page_duration": "200000"}},
    "packets.ts": {"codec": "mpeg2video"},
    "packets.m2ts": {},
    "program.mpg": {"codec": "mpeg2video", "b_frames": 2},
}


def write(name: str, folder: Path) -> bytes:
    return write_video(folder / name, COUNT, g="10", **CONTAINERS[name]).read_bytes()


def is_accepted(path: Path, content: bytes) -> bool:
    """Whether a clip of one frame can be read; nothing else is decoded."""
    path.write_bytes(content)
    try:
        read_frames(str(path), Sampling(1, None, 1), None, None)
    except (BadVideoError, av.FFmpegError):
        return False
    return True


CUTS = [*range(1, 10)]  # tenths of the file
UNKNOWN = {
    "packets.ts",
    "packets.m2ts",
    "program.mpg",
}  # which are only parts in a row, of 188, 192 and 2048 bytes here


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_cut_within_a_part_of_its_container_is_refused(name: str, tmp_path: Path) -> None:
    content = write(name, tmp_path)
    assert is_accepted(tmp_path / name, content)
    size = {"packets.ts": 188, "packets.m2ts": 192, "program.mpg": 2048}.get(name, 1)
    tenths = CUTS[:-1] if name == "program.mpg" else CUTS  # its last pack is filled up with padding
    cuts = [len(content) * tenth // 10 // size * size + size // 2 for tenth in tenths]
    assert [cut for cut in cuts if is_accepted(tmp_path / name, content[:cut])] == []


@pytest.mark.parametrize("name", sorted(CONTAINERS.keys() - UNKNOWN - {"fragments.mp4", "live.mkv", "live.webm"}))
def test_a_file_that_tells_its_end_is_refused_wherever_it_is_cut(name: str, tmp_path: Path) -> None:
    content = write(name, tmp_path)
    cuts = range(1, len(content), len(content) // 150)
    assert [cut for cut in cuts if is_accepted(tmp_path / name, content[:cut])] == []


def borders(content: bytes, mark: bytes, before: int = 0) -> list[int]:
    """Where the parts with this mark begin, except the first: a cut there leaves only complete parts."""
    places = [k - before for k in range(len(content)) if content.startswith(mark, k)]
    return places[1:]


@pytest.mark.parametrize(
    ("name", "mark", "before"),
    [
        ("fragments.mp4", b"moof", 4),
        ("live.mkv", b"\x1f\x43\xb6\x75", 0),
        ("live.webm", b"\x1f\x43\xb6\x75", 0),
        ("packets.ts", b"\x47\x41\0", 0),  # the first packet of a frame
        ("program.mpg", b"\0\0\1\xba", 0),
    ],
)
def test_a_cut_between_two_parts_cannot_be_known(name: str, mark: bytes, before: int, tmp_path: Path) -> None:
    """docs/video.md lists these containers: nothing in the file shows that a part is missing."""
    content = write(name, tmp_path)
    cuts = borders(content, mark, before)
    assert len(cuts) > 2
    late = [cut for cut in cuts if cut > len(content) // 2]
    assert [cut for cut in late if not is_accepted(tmp_path / name, content[:cut])] == []


# --- complete files without a length


class Pipe:
    """A file that can only be written in order, like a pipe or a socket."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


PIPED = {
    "mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "matroska": ("libx264", {}),
    "webm": ("libvpx", {}),
    "avi": ("libx264", {}),
    "flv": ("libx264", {}),
    "ogg": ("libvpx", {}),
    "asf": ("wmv2", {}),
    "mpegts": ("libx264", {}),
    "mpeg": ("mpeg2video", {}),
}


def write_piped(container: str, path: Path) -> bytes:
    codec, options = PIPED[container]
    pipe = Pipe(path)
    with av.open(pipe, "w", format=container, options=options) as made:
        stream = made.add_stream(codec, rate=RATE, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frame in enumerate(drawn(COUNT)):
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    pipe.close()
    return path.read_bytes()


@pytest.mark.parametrize(("container", "mark"), [("avi", b"00dc"), ("asf", b"\x82\0\0")])
def test_cuts_of_avi_and_asf_written_to_a_pipe_cannot_be_known(container: str, mark: bytes, tmp_path: Path) -> None:
    """They have no length, and AVI then has no index: cuts between chunks or packets go unnoticed."""
    path = tmp_path / "v"
    content = write_piped(container, path)
    late = [cut for cut in borders(content, mark) if cut > len(content) // 2]
    assert late
    assert [cut for cut in late if not is_accepted(path, content[:cut])] == []


@pytest.mark.parametrize("container", PIPED)
def test_a_file_written_to_a_pipe_is_whole(container: str, tmp_path: Path) -> None:
    path = tmp_path / "v"
    write_piped(container, path)
    images, _ = read_frames(str(path), Sampling(COUNT, None, 1), None, None)
    assert len(images) == COUNT


def test_the_length_in_an_flv_files_metadata_counts(tmp_path: Path) -> None:
    content = write("h264.flv", tmp_path)
    at = content.index(b"filesize\0") + 9
    longer = content[:at] + struct.pack(">d", len(content) + 1) + content[at + 8 :]
    unknown = content[:at] + bytes(8) + content[at + 8 :]
    assert [is_accepted(tmp_path / "v.flv", each) for each in (content, longer, unknown)] == [True, False, True]


def test_an_ogg_file_without_a_mark_of_its_end_is_refused_with_the_remedy(tmp_path: Path) -> None:
    content = bytearray(write("vp8.ogv", tmp_path))
    content[content.rindex(b"OggS") + 5] &= ~4
    path = tmp_path / "v.ogv"
    path.write_bytes(content)
    with pytest.raises(BadVideoError, match=r"its last page does not end a stream; .* remux it \(ffmpeg -i IN\.ogv"):
        read_frames(str(path), Sampling(1, None, 1), None, None)
