"""The views of a video as samples: clips of frames, decoded by processes beside this one.

A video is decoded once for all its views while they are asked for at about the same time, and they share one outcome:
if a frame of one cannot be decoded, none can.
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
from extract.sources.samples import Clip, Listing, Medium, Sample
from extract.sources.tables import list_csv
from extract.video.clips import VERSION, Sampling, crop_boxes
from extract.video.containers import ENDINGS
from extract.video.process_pool import WorkerError, Workers
from store.errors import JobError, UserError

_PROBE_SECONDS = 60.0
_KEPT = 4  # videos whose frames stay in memory, beside those that are being decoded


@dataclass(frozen=True, slots=True)
class Video:
    """One view of the part of a video between `start` and `end`, in seconds after its first frame (None: its own)."""

    path: str
    clips: ClipConfig
    start: float | None = None
    end: float | None = None
    view: int = 0

    def decode(self, sample_id: str) -> Clip:
        """Upright RGB frames; DecodeError, which names the video, if any of its views cannot be decoded."""
        name = sample_id.rpartition("#")[0] if self.clips.views > 1 else sample_id
        decoded = _service().decoded(replace(self, view=0), name)
        clip, crop = divmod(self.view, self.clips.crops)
        height, width = decoded.frames.shape[1:3]
        left, top, right, bottom = crop_boxes(width, height, self.clips.crops)[crop]
        return tuple(Image.fromarray(decoded.frames[k, top:bottom, left:right]) for k in decoded.shown[clip])

    def digest(self, sample_id: str) -> bytes:
        """16 bytes of blake2b over the file, and over the part of it that is meant; the same for all views."""
        try:
            status = Path(self.path).stat()
            content = _file_digest(self.path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise _unreadable(sample_id, self.path, error) from error
        if self.start is self.end is None:
            return content
        return blake2b(content + f"{self.start} {self.end}".encode(), digest_size=16).digest()


class Decoded(NamedTuple):
    """The frames that the clips of a video show, each once, and clip by clip their indices."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    shown: Sequence[Sequence[int]]


def list_video_folder(config: DataConfig) -> Listing:
    return list_folder(config, _medium(config))


def list_video_csv(config: DataConfig) -> Listing:
    return list_csv(config, _medium(config))


def _medium(config: DataConfig) -> Medium:
    if importlib.util.find_spec("av") is None:
        raise UserError("video needs PyAV; install it with: pip install 'sidecache[video]'")
    assert config.clips is not None
    return Medium("videos", ENDINGS, partial(Video, clips=config.clips), has_parts=True)


def expand_views(samples: Sequence[Sample], views: int) -> Sequence[Sample]:
    """Every video's views in its place: `path#0`, `path#1` ..., clip by clip and in it crop by crop; one is `path`."""
    if views == 1:
        return samples
    return [
        Sample(f"{sample.id}#{view}", sample.labels, replace(sample.content, view=view))  # type: ignore[type-var]
        for sample in samples
        for view in range(views)
    ]


def sampling_text(clips: ClipConfig) -> str:
    """All that decides which frames and crops are taken."""
    return json.dumps({"version": VERSION, **clips.model_dump(exclude={"time_limit"})}, sort_keys=True)


class Decoder(NamedTuple):
    """What decodes videos here.

    Attributes:
        digest: of what it makes of a fixed clip (probe.py).
        versions: library -> version, for the record.
    """

    digest: str
    versions: dict[str, str]


class VideoService:
    """Decodes videos in workers and keeps the last few, whose other views are about to be asked for."""

    def __init__(self) -> None:
        self.workers = Workers()
        self._lock = threading.Lock()
        self._recent: OrderedDict[Video, Future[Decoded]] = OrderedDict()

    def decoded(self, video: Video, name: str) -> Decoded:
        """All clips of the video, which errors call `name`."""
        with self._lock:
            future = self._recent.get(video)
            is_mine = future is None
            if future is None:
                future = self._recent[video] = Future()
            self._recent.move_to_end(video)
        if is_mine:
            self._fill(future, video, name)
        try:
            return future.result()
        except DecodeError as error:
            raise DecodeError(str(error)) from error  # one for each thread: raising it changes its traceback

    def probe(self) -> Decoder:
        """Ask a worker what decodes; JobError where it cannot tell."""
        try:
            header, _ = self.workers.ask({"probe": True}, _PROBE_SECONDS)
        except WorkerError as error:
            raise JobError(f"the decoder of videos does not work: {error}; reinstall PyAV (av)") from error
        return Decoder(header["digest"], header["versions"])

    def _fill(self, future: "Future[Decoded]", video: Video, name: str) -> None:
        try:
            future.set_result(self._decode(video, name))
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, DecodeError):
                with self._lock:
                    self._recent.pop(video, None)
        with self._lock:
            for old in [each for each, decoding in self._recent.items() if decoding.done()][:-_KEPT]:
                del self._recent[old]

    def _decode(self, video: Video, name: str) -> Decoded:
        clips = video.clips
        request = {
            "path": os.path.abspath(video.path),  # noqa: PTH100 (links are left as they are)
            "start": video.start,
            "end": video.end,
            "sampling": asdict(Sampling(clips.frames, clips.stride, clips.clips)),
        }
        try:
            header, frames = self.workers.ask(request, clips.time_limit)
        except WorkerError as error:
            raise undecodable(name, error) from error
        if "unreadable" in header:  # the listing found it, so this is the disk's fault and no sample to skip
            raise _unreadable(name, video.path, header["unreadable"])
        if frames is None:
            raise undecodable(name, ValueError(header["undecodable"]))
        return Decoded(frames, header["shown"])


@lru_cache(maxsize=1)
def decoder() -> Decoder:
    """What decodes videos in this process's workers. JobError where they do not work."""
    return _service().probe()


_services: dict[int, VideoService] = {}


def _service() -> VideoService:
    """This process's own: after a fork neither the parent's workers nor its locks can be used."""
    service = _services.get(os.getpid())
    return service or _services.setdefault(os.getpid(), VideoService())


@atexit.register
def _close() -> None:
    if service := _services.get(os.getpid()):
        service.workers.close()


@lru_cache(maxsize=256)
def _file_digest(path: str, n_bytes: int, mtime_ns: int) -> bytes:
    """Once for all views and parts of a file, unless it changes."""
    with Path(path).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).digest()


def _unreadable(name: str, path: str, error: object) -> JobError:
    return JobError(f"sample {name!r} cannot be read from {path}: {error}")
