"""Lists the views of videos as samples: each view is a clip of frames, decoded in a worker process.

A video is decoded once for all views that are requested at about the same time, and they share one result: if a frame
of one view cannot be decoded, no view can.
"""

import atexit
import importlib.util
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from extract.config import ClipConfig, DataConfig
from extract.images.decode import DecodeError, undecodable
from extract.sources.folders import list_folder
from extract.sources.samples import Clip, FileKind, Sample, SourceSamples
from extract.sources.tables import list_csv
from extract.video.clip_sampling import VERSION, Sampling, crop_boxes
from extract.video.containers import EXTENSIONS
from extract.video.process_pool import ProcessPool, WorkerError
from store.errors import JobError, UserError

_INFO_SECONDS = 60.0
_CACHED_VIDEOS = 4  # whose frames stay in memory, besides those that are being decoded


@dataclass(frozen=True, slots=True)
class Video:
    """One view of a video, or of the part between `start` and `end`, in seconds after its first frame."""

    path: str
    clips: ClipConfig
    start: float | None = None
    end: float | None = None
    view: int = 0

    def decode(self, sample_id: str) -> Clip:
        """Upright RGB frames; raises DecodeError, which names the video, if any of its views cannot be decoded."""
        video_id = sample_id.rpartition("#")[0] if self.clips.views > 1 else sample_id
        decoded = _decoder().decode(replace(self, view=0), video_id)
        clip, crop = divmod(self.view, self.clips.crops)
        height, width = decoded.frames.shape[1:3]
        left, top, right, bottom = crop_boxes(width, height, self.clips.crops)[crop]
        return tuple(Image.fromarray(decoded.frames[k, top:bottom, left:right]) for k in decoded.clips[clip])

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the file and, of a part, its start and end; the same for all views."""
        try:
            status = Path(self.path).stat()
            content = _file_digest(self.path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise _unreadable(sample_id, self.path, error) from error
        if self.start is None and self.end is None:
            return content
        return blake2b(content + f"{self.start} {self.end}".encode(), digest_size=16).digest()


class DecodedVideo(NamedTuple):
    """The frames that the clips of a video show, each once, and for each clip the indices of its frames."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    clips: Sequence[Sequence[int]]


def list_video_folder(config: DataConfig) -> SourceSamples:
    """All videos of the folder `data.root`."""
    return list_folder(config, _kind_of(config))


def list_video_csv(config: DataConfig) -> SourceSamples:
    """All videos, or parts of videos, of the CSV file `data.root`."""
    return list_csv(config, _kind_of(config))


def _kind_of(config: DataConfig) -> FileKind:
    assert config.clips is not None
    return video_kind(config.clips)


def video_kind(clips: ClipConfig) -> FileKind:
    """Videos, sampled as `clips` says.

    Raises:
        UserError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("video needs PyAV; install it with: pip install 'sidecache[video]'")
    return FileKind(plural="videos", extensions=EXTENSIONS, content=partial(Video, clips=clips), has_parts=True)


def expand_views(samples: Sequence[Sample], views: int) -> Sequence[Sample]:
    """Replace every video by its views: `path#0`, `path#1`, ..., clip by clip, and within a clip crop by crop.

    The id of a single view is `path`.
    """
    if views == 1:
        return samples
    return [
        Sample(f"{sample.id}#{view}", sample.labels, replace(sample.content, view=view))  # type: ignore[type-var]
        for sample in samples
        for view in range(views)
    ]


def sampling_text(clips: ClipConfig) -> str:
    """All settings that determine which frames and crops are taken, as JSON."""
    return json.dumps({"version": VERSION, **clips.model_dump(exclude={"time_limit"})}, sort_keys=True)


class DecoderInfo(NamedTuple):
    """The video decoder of this process's workers.

    Attributes:
        digest: of the frames that it decodes from a fixed clip; see `extract.video.decoder_digest`.
        versions: library -> version, for the record.
    """

    digest: str
    versions: dict[str, str]


class VideoDecoder:
    """Decodes videos in a process pool and caches the last few, since their other views are about to be requested."""

    def __init__(self) -> None:
        self.pool = ProcessPool()
        self._lock = threading.Lock()
        self._recent: OrderedDict[Video, Future[DecodedVideo]] = OrderedDict()

    def decode(self, video: Video, video_id: str) -> DecodedVideo:
        """All clips of the video.

        Raises:
            DecodeError: the video cannot be decoded; the message names `video_id`.
        """
        with self._lock:
            future = self._recent.get(video)
            is_first_request = future is None
            if future is None:
                future = self._recent[video] = Future()
            self._recent.move_to_end(video)
        if is_first_request:
            self._complete(future, video, video_id)
        try:
            return future.result()
        except DecodeError as error:
            raise DecodeError(str(error)) from error  # a new one for each thread: raising it changes its traceback

    def info(self) -> DecoderInfo:
        """Ask a worker for its decoder.

        Raises:
            JobError: the decoder does not work.
        """
        try:
            header, _ = self.pool.ask({"info": True}, _INFO_SECONDS)
        except WorkerError as error:
            raise JobError(f"the video decoder does not work: {error}; reinstall PyAV (av)") from error
        return DecoderInfo(header["digest"], header["versions"])

    def _complete(self, future: "Future[DecodedVideo]", video: Video, video_id: str) -> None:
        try:
            future.set_result(self._decode(video, video_id))
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, DecodeError):
                with self._lock:
                    self._recent.pop(video, None)
        with self._lock:
            finished = [video for video, future in self._recent.items() if future.done()]
            for old in finished[:-_CACHED_VIDEOS]:
                del self._recent[old]

    def _decode(self, video: Video, video_id: str) -> DecodedVideo:
        clips = video.clips
        request = {
            "path": os.path.abspath(video.path),  # noqa: PTH100 (unlike Path.resolve, it keeps links)
            "start": video.start,
            "end": video.end,
            "sampling": asdict(Sampling(clips.frames, clips.stride, clips.clips)),
        }
        try:
            header, frames = self.pool.ask(request, clips.time_limit)
        except WorkerError as error:
            raise undecodable(video_id, error) from error
        if "unreadable" in header:  # the file was there when it was listed: a failure of the disk, no sample to skip
            raise _unreadable(video_id, video.path, header["unreadable"])
        if frames is None:
            raise undecodable(video_id, ValueError(header["undecodable"]))
        return DecodedVideo(frames, header["clips"])


@lru_cache(maxsize=1)
def decoder_info() -> DecoderInfo:
    """The video decoder of this process's workers.

    Raises:
        JobError: the decoder does not work.
    """
    return _decoder().info()


_decoders: dict[int, VideoDecoder] = {}  # by process id


def _decoder() -> VideoDecoder:
    """The decoder of the current process: after a fork, neither the parent's workers nor its locks can be used."""
    decoder = _decoders.get(os.getpid())
    return decoder or _decoders.setdefault(os.getpid(), VideoDecoder())


@atexit.register
def _close() -> None:
    if decoder := _decoders.get(os.getpid()):
        decoder.pool.close()


@lru_cache(maxsize=256)
def _file_digest(path: str, n_bytes: int, mtime_ns: int) -> bytes:
    """Computed once for all views and parts of a file, unless the file changes."""
    with Path(path).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).digest()


def _unreadable(video_id: str, path: str, error: object) -> JobError:
    return JobError(f"sample {video_id!r} cannot be read from {path}: {error}")
