"""Computes a digest that identifies the video decoder of this process: it changes when decoded pixels change.

It is a hash of the frames decoded from `probe.mkv`, a fixed file with three frames of 50 x 34 pixels in each of H.264,
HEVC, VP8, VP9, AV1 and MPEG-4. Releases of PyAV and FFmpeg that decode it to the same RGB values have the same digest.
"""

from hashlib import blake2b
from pathlib import Path

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext

_CLIP = Path(__file__).with_name("probe.mkv")
_LIBRARIES = ("libavformat", "libavcodec", "libswscale")  # those that affect the pixels


def decoder_digest() -> str:
    """Hash of the frames of all streams of the fixed clip, as 8-bit RGB; a missing codec changes it too."""
    digest = blake2b(digest_size=16)
    with av.open(str(_CLIP)) as container:
        n_streams = len(container.streams.video)
    for number in range(n_streams):
        with av.open(str(_CLIP)) as container:
            digest.update(_frames(container, number))
    return digest.hexdigest()


def decoder_versions() -> dict[str, str]:
    """Versions of PyAV and of the FFmpeg libraries in it, by name."""
    libraries = {name: ".".join(map(str, av.library_versions[name])) for name in _LIBRARIES}
    return {"av": av.__version__, **libraries}


def _frames(container: InputContainer, number: int) -> bytes:
    stream = container.streams.video[number]
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        return b"no decoder"
    decoder.thread_count = 1
    return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(stream))
