"""What the decoder of this process makes of a fixed clip: a digest that changes when decoded pixels do.

`probe.mkv` holds three frames of 50 x 34 pixels in each of H.264, HEVC, VP8, VP9, AV1 and MPEG-4, as encoders once
wrote them. Releases of PyAV and FFmpeg that decode them and convert them to RGB alike have one digest.
"""

from hashlib import blake2b
from pathlib import Path

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext

_CLIP = Path(__file__).with_name("probe.mkv")
_LIBRARIES = ("libavformat", "libavcodec", "libswscale")  # those that decide which pixels come of a file


def decoder_digest() -> str:
    """Hash of the probe's frames, stream after stream, as 8-bit RGB; a codec that is not there counts as such."""
    digest = blake2b(digest_size=16)
    with av.open(str(_CLIP)) as container:
        n_streams = len(container.streams.video)
    for number in range(n_streams):
        with av.open(str(_CLIP)) as container:
            digest.update(_frames(container, number))
    return digest.hexdigest()


def decoder_versions() -> dict[str, str]:
    """PyAV and the parts of FFmpeg in it -> version."""
    libraries = {name: ".".join(map(str, av.library_versions[name])) for name in _LIBRARIES}
    return {"av": av.__version__, **libraries}


def _frames(container: InputContainer, number: int) -> bytes:
    stream = container.streams.video[number]
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        return b"no decoder"
    decoder.thread_count = 1
    return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(stream))
