"""Measures what a sample costs on this machine, in a few seconds of work on random values of the job's shapes.

No weights are loaded and nothing of the job is computed. The forward pass is timed on one block of the backbone, and
the time of the others follows from their operations. Training steps are timed on a small temporary store.
"""

import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapt.config.trials import MethodConfig
from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.feature_source import Features
from adapt.job.trial_count import trials_of
from adapt.methods.registry import build_model
from adapt.planning import laps
from adapt.planning.job_facts import JobFacts
from adapt.planning.laps import lap
from adapt.planning.step_speeds import StepSeconds, layers_of, seconds_of_trials, step_seconds
from extract.backbones.backbone import ModelBackbone
from extract.config import ExtractConfig
from extract.forward.device import resolve_device
from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import FrozenForward, preprocess
from extract.images.decode import DecodeError
from extract.sources.open_source import ImageSplit
from store.address import local_path, store_url
from store.arrays import STORED
from store.dtypes import CODES
from store.kvstore import KeyValueStore
from store.layout import in_groups
from store.listing import Listing
from store.reader import open_store
from store.schema import Schema, SplitInfo
from store.writer import StoreWriter, create_store

_STORE_BYTES = {"cpu": 2**25, "cuda": 2**29}  # of the temporary store
_MOST_BATCHES = 8  # in the temporary store
_DECODED_SAMPLES = 9
_READ_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds a sample.

    Args:
        decode: reading and preprocessing, on one core; None if there are no samples.
        forward: the frozen backbone, up to the last layer of the features.
        encode: from the device to the stored format, all layers.
        write: to the disk of the store, all layers; None for a store that is not local.
        steps: a training step of one trial by feature source: `resident`, and `streamed` from a local store.
        end_to_end: a training step through the backbone, without decoding; None if no method takes one.
        read: reading and decoding the layers that the job reads, once, from the page cache.
        read_cold: reading them from the disk, without decoding; None for a store that is not local.
        trials: of every method that is trained step by step from features.
        forward_flops: operations of `forward`, 2 for a multiply-add.
        cores: that decode.
        gpus: that extract, while the cores decode; 0 if the same cores run the backbone.
    """

    decode: float | None
    forward: float
    encode: float
    write: float | None
    steps: dict[str, float]
    end_to_end: float | None
    read: float = 0.0
    read_cold: float | None = None
    trials: tuple[StepSeconds, ...] = ()
    forward_flops: int = 0
    cores: int = 1
    gpus: int = 0

    def waiting(self, source: str) -> float:
        """Seconds a sample that a training step waits for a feature source."""
        return max(0.0, self.steps[source] - self.steps["resident"])


def measure_speeds(job: JobFacts) -> Speeds:
    """Measure what a sample of a job costs."""
    last_layer = job.schema.layers[-1]
    with torch.random.fork_rng(devices=[]):
        forward = forward_seconds(job.shape, last_layer, job.config.extract)
        of_store = _measure_store(job)
    end_to_end = None
    if job.end_to_end:
        end_to_end = forward * _training_flops(job, job.end_to_end) / _forward_flops(job.shape, last_layer)
    return Speeds(
        decode=decode_seconds(job.source.splits["train"], job.shape) if job.source else None,
        forward=forward,
        end_to_end=end_to_end,
        forward_flops=_forward_flops(job.shape, last_layer),
        cores=os.cpu_count() or 1,
        gpus=int(resolve_device(job.config.extract.device).type == "cuda"),
        **of_store,
    )


def decode_seconds(images: ImageSplit, shape: ModelBackbone) -> float | None:
    """Seconds that one core takes to read and preprocess a sample: the mean of a few, spread over the split."""
    taken: list[float] = []
    for row in np.unique(np.linspace(0, len(images) - 1, _DECODED_SAMPLES, dtype=np.int64)):
        started = time.perf_counter()
        try:
            preprocess(shape.transform, images[int(row)], images.ids[row])
        except DecodeError:
            continue
        taken.append(time.perf_counter() - started)
        if sum(taken) > 2 * laps.SECONDS:
            break
    return mean(taken[1:] or taken) if taken else None  # the first is a warm-up


def forward_seconds(shape: ModelBackbone, layer: int, config: ExtractConfig) -> float:
    """Seconds a sample through blocks 0 to `layer`, at the rate (operations a second) of the first block."""
    block = shape.trainable_copy(1)
    ratio = _forward_flops(shape, layer) / _forward_flops(block, 0)
    _fill(block.module)
    forward = FrozenForward(block, [0], "all", config)

    def seconds(n: int) -> float:
        images = torch.randn(n, *shape.image_size, device=forward.device)
        return lap(lambda: forward(images), forward.device) / n

    one = seconds(1)
    n = max(1, int(laps.SECONDS / one))
    n = min(n, forward.batch_size(n))
    return ratio * (seconds(n) if n > 1 else one)


def _fill(module: nn.Module) -> None:
    """Move a module from the meta device to the CPU, with random weights."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in module.buffers():  # some hold indices, and zero is always a legal one
        buffer.zero_()


def _forward_flops(backbone: ModelBackbone, layer: int) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.tokens(torch.zeros(1, *backbone.image_size), [layer])
    return int(counter.get_total_flops())


def _training_flops(job: JobFacts, method: MethodConfig) -> int:
    options, num_classes = method.trials[0].options, len(job.schema.classes)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(method.name, job.spec, num_classes, options, backbone=job.shape)
        model(torch.zeros(1, *job.shape.image_size)).sum().backward()
    return int(counter.get_total_flops())


def _measure_store(job: JobFacts) -> dict[str, Any]:
    """The speeds of encoding, writing, reading and training.

    All but the last are proportional to the number of layers, of which the temporary store may hold only some.
    """
    config, device = job.config, resolve_device(job.config.train.device)
    read = layers_of(job.stepwise, job.spec)
    n_bytes = _STORE_BYTES.get(device.type, _STORE_BYTES["cpu"])
    small = _small_schema(job.schema, read, job.stepwise.batch_size, n_bytes)
    path = local_path(store_url(config.store.path))
    with tempfile.TemporaryDirectory(prefix=".sidecache-plan-", dir=_writable_folder(path)) as folder:
        encode, write = _fill_store(folder, small, resolve_device(config.extract.device))
        streamed = StreamedFeatures(open_store(folder), device)
        resident = ResidentFeatures(streamed, small.layers)
        sources: list[Features] = [resident] if path is None else [resident, streamed]
        ratio = len(read) / len(small.layers)
        steps = {source.kind: ratio * step_seconds(source, job.stepwise, config) for source in sources}
        cold, warm = _read_cold(Path(folder), small), _read(streamed)
        trials = [
            seconds_of_trials(resident, trials, config, job.spec) for trials in trials_of(config) if trials.in_steps
        ]
    stored, needed = len(job.schema.layers) / len(small.layers), len(job.layers_read) / len(small.layers)
    return {
        "encode": stored * encode,
        "write": None if path is None else stored * write,
        "steps": steps,
        "read": needed * warm,
        "read_cold": None if path is None else needed * cold,
        "trials": tuple(trials),
    }


def _read(features: StreamedFeatures) -> float:
    """Seconds a sample to read and decode all layers, batch by batch in order."""
    rows = np.arange(len(features.labels("train")))
    groups = in_groups(rows, _READ_ROWS)
    return lap(lambda: deque(features.batches("train", groups, features.spec.layers), 0), features.device) / len(rows)


def _read_cold(folder: Path, schema: Schema) -> float:
    """Seconds a sample to read the files of all layers after the system has dropped them from memory."""
    files = [file for file in folder.glob("train/*_*/c/**/*") if file.is_file()]
    for file in files if hasattr(os, "posix_fadvise") else ():  # not on a Mac, where they are read from memory
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    for file in files:
        file.read_bytes()
    return (time.perf_counter() - started) / schema.splits["train"].num_samples


def _small_schema(schema: Schema, layers: tuple[int, ...], batch_size: int, n_bytes: int) -> Schema:
    """A store of one shard with a few samples; if one sample is too large, of the last few layers only."""
    layer_bytes = schema.bytes_per_sample // len(schema.layers)
    few_layers = layers[-max(1, n_bytes // layer_bytes) :]
    samples = max(1, min(_MOST_BATCHES * batch_size, n_bytes // (layer_bytes * len(few_layers))))
    changes = {
        "layers": few_layers,
        "splits": {"train": SplitInfo(num_samples=samples)},
        "shard_samples": samples,
        "views": 1,
        "tail_tensors": (),
        # without preprocessing the store is read as one with a plain norm as its tail
        "provenance": schema.provenance.model_copy(update={"preprocessing": ""}),
    }
    return schema.model_copy(update=changes)


def _writable_folder(path: Path | None) -> Path | None:
    """A folder on the disk of the store; None, for the system's temporary folder, if it is not writable."""
    existing = next((parent for parent in path.parents if parent.is_dir()), None) if path else None
    return existing if existing and os.access(existing, os.W_OK) else None


def _fill_store(folder: str, schema: Schema, device: torch.device) -> tuple[float, float]:
    """Write random samples; return the seconds a sample to encode and to write."""
    # random tokens, and a store for them
    rows = schema.splits["train"].num_samples
    size = (rows, schema.token_layout.num_tokens, schema.dim)
    tokens = {layer: torch.randn(size, device=device) for layer in schema.layers}
    rms = {layer: np.ones(schema.dim, np.float32) for layer in schema.layers} if schema.dtype in CODES else {}
    ids = tuple(map(str, range(rows)))
    labels = np.zeros((rows, len(schema.classes)), np.uint8) if schema.multi_label else np.zeros(rows, np.int64)
    kvstore = KeyValueStore(store_url(folder))
    listings = {"train": Listing(ids, labels, np.zeros((rows, 16), np.uint8))}
    create_store(kvstore, schema, listings, rms=rms, tail={})
    # encode twice, since the first time takes longer, then write
    rms_on_device = {layer: torch.from_numpy(values).to(device) for layer, values in rms.items()}
    Encoding(tokens, ids, schema.dtype, rms_on_device).result()
    started = time.perf_counter()
    encoded = Encoding(tokens, ids, schema.dtype, rms_on_device).result()
    encoded_at = time.perf_counter()
    StoreWriter(kvstore, schema).commit("train", 0, encoded, np.full(rows, STORED, np.uint8))
    return (encoded_at - started) / rows, (time.perf_counter() - encoded_at) / rows
