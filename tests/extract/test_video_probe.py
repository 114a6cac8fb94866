"""A store of videos has a digest of a fixed clip's decoded frames, so that a decoder with other pixels is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from tiny_vit import TINY
from video_files import write_video

import sidecache as sc
from adapt.config.load_config import load_config
from adapt.config.pipeline import Config
from extract.job.cluster_worker import _decoder_digest, _require_same
from extract.sources.videos import DecoderInfo, decoder_info
from extract.video import decoder_digest as probe
from store.errors import JobError, OtherStoreError


@pytest.fixture
def job(tmp_path: Path) -> Config:
    for split in ("train", "test"):
        for label in ("a", "b"):
            for number in range(3):
                write_video(tmp_path / "videos" / split / label / f"{number}.mp4", 6)
    return load_config(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {
                "source": "video_folder",
                "root": str(tmp_path / "videos"),
                "val_fraction": 0.34,
                "video": {"frames": 2},
            },
            "backbone": {
                "name": "vit_tiny_patch16_224",
                "weights": "random",
                "image_size": 32,
                "model_kwargs": dict(TINY),
            },
            "store": {"path": str(tmp_path / "cache.zarr"), "dtype": "float32"},
            "train": {"epochs": 1, "seeds": [0]},
            "methods": ["linear_probe"],
        }
    )


def replace_decoder(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    monkeypatch.setattr("extract.job.store_schema.decoder_info", lambda: DecoderInfo(digest, {"av": "99.0.1"}))


def test_the_probe_is_decoded_in_full_and_every_codec_of_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with av.open(str(probe._CLIP)) as container:
        codecs = [stream.codec_context.codec.canonical_name for stream in container.streams.video]
        packets = [packet for packet in container.demux() if packet.size]
    assert codecs == ["h264", "hevc", "vp8", "vp9", "av1", "mpeg4"]
    assert len(packets) == 3 * len(codecs)
    digests, frames = {probe.decoder_digest()}, probe._frames

    def change(codec: int) -> Any:
        return lambda container, number: frames(container, number)[:: -1 if number == codec else 1]

    for codec in range(len(codecs)):
        assert len(frames(av.open(str(probe._CLIP)), codec)) == 3 * 50 * 34 * 3
        monkeypatch.setattr(probe, "_frames", change(codec))
        digests.add(probe.decoder_digest())
    assert len(digests) == 1 + len(codecs)


def test_every_process_has_the_same_digest() -> None:
    code = "from extract.video.decoder_digest import decoder_digest; print(decoder_digest())"
    digest = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert digest == decoder_info().digest == probe.decoder_digest()


def test_a_store_of_videos_names_its_decoder(job: Config) -> None:
    schema = sc.extract(job).store.schema
    assert schema.provenance.decoder_digest == decoder_info().digest
    assert schema.libraries["av"] == av.__version__
    assert schema.libraries["libavcodec"] == ".".join(map(str, av.library_versions["libavcodec"]))


def test_another_version_that_decodes_alike_goes_on_with_a_store(job: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sc.extract(job).store.schema
    replace_decoder(monkeypatch, decoder_info().digest)
    assert sc.extract(job).shards_written == 0
    root = Path(job.data.root or "")
    write_video(root / "train" / "a" / "3.mp4", 6)
    grown = sc.extract(job).store
    assert (grown.num_samples("train"), grown.schema.libraries) == (7, before.libraries)


def test_a_decoder_with_other_pixels_is_refused_by_name(job: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sc.extract(job)
    replace_decoder(monkeypatch, "0" * 32)
    with pytest.raises(
        OtherStoreError, match=r"\.decoder_digest: stored .*\n  libraries: stored {'av': .* wanted {'av': '99\.0\.1'}"
    ):
        sc.extract(job)


def test_training_from_a_store_needs_no_decoder(job: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sc.extract(job)
    monkeypatch.setattr("extract.sources.videos.VideoDecoder.info", lambda service: pytest.fail("it was asked for"))
    decoder_info.cache_clear()
    assert len(sc.train(job)) == 1


def test_a_worker_with_another_decoder_is_refused(job: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = sc.extract(job).store.schema
    _require_same(schema, _decoder_digest(schema))
    monkeypatch.setattr("extract.job.cluster_worker.decoder_info", lambda: DecoderInfo("0" * 32, {}))
    with pytest.raises(JobError, match=r"this worker's decoder_digest is 0{32}, the job's is"):
        _require_same(schema, _decoder_digest(schema))


def test_a_decoder_that_does_not_work_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.sources.videos._INFO_SECONDS", 0.0)
    decoder_info.cache_clear()
    with pytest.raises(JobError, match=r"the video decoder does not work: .*reinstall PyAV"):
        decoder_info()
    decoder_info.cache_clear()
