"""What a sample costs on this machine, from a few seconds of work on random values of the true shapes.

No weights are loaded and nothing of the job is computed. The forward pass is timed on one block of the backbone's own
shape and goes on at that rate; a training step is the training loop itself, on a small store that is deleted again.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapt.config.pipeline import Config, MethodConfig
from adapt.features.feature_sources import Features, ResidentFeatures, StreamedFeatures
from adapt.job.training_job import settings_of
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.table import build_model
from adapt.training.candidate import Candidate
from adapt.training.loop import TrainingTask, fit
from adapt.training.objective import make_objective
from extract.backbones.backbone import ModelBackbone
from extract.config import ExtractConfig
from extract.forward.device import resolve_device, synchronize
from extract.forward.encoding import Encoding
from extract.forward.frozen_forward import FrozenForward, preprocess
from extract.images.decode import DecodeError
from extract.sources.open_source import ImageSplit
from store.address import local_path, store_url
from store.arrays import STORED
from store.kvstore import KeyValueStore
from store.reader import open_store
from store.schema import Schema, SplitInfo
from store.writer import Listing, StoreWriter, create_store

_SECONDS = 0.5  # that a measurement goes on; a call that takes longer is enough
_BYTES = {"cpu": 2**25, "cuda": 2**29}  # of the small store
_BATCHES = 8  # that it holds at most
_DECODED = 9  # samples


@dataclass(frozen=True)
class Speeds:
    """Seconds a sample.

    Args:
        decode: reading and preprocessing, on one core; None where no sample is here.
        forward: the frozen backbone, up to the last layer of the features.
        encode: from the device to the stored format, all layers.
        write: to the disk of the store, all layers; None for a store that is not local.
        steps: a training step, by the features that it reads: `resident`, and `streamed` from a local store.
        end_to_end: a training step through the backbone, decoding left out; None where no method takes one.
    """

    decode: float | None
    forward: float
    encode: float
    write: float | None
    steps: dict[str, float]
    end_to_end: float | None


@dataclass(frozen=True)
class Planned:
    """What is to be measured.

    Args:
        shape: the backbone on the meta device.
        schema: of the store; `spec` is that of its features.
        cached: the method whose steps on features are timed.
        end_to_end: one that trains through the backbone.
        images: samples to decode; None where they are not here.
    """

    config: Config
    shape: ModelBackbone
    schema: Schema
    spec: FeatureSpec
    cached: MethodConfig
    end_to_end: MethodConfig | None
    images: ImageSplit | None


def calibrate(planned: Planned) -> Speeds:
    """Measure what a sample costs."""
    shape, last = planned.shape, planned.schema.layers[-1]
    with torch.random.fork_rng(devices=[]):
        forward = forward_seconds(shape, last, planned.config.extract)
        encode, write, steps = _store_seconds(planned)
    end_to_end = None
    if planned.end_to_end:
        end_to_end = forward * _training_flops(planned, planned.end_to_end) / _forward_flops(shape, last)
    decode = None if planned.images is None else decode_seconds(planned.images, shape)
    return Speeds(decode, forward, encode, write, steps, end_to_end)


def decode_seconds(images: ImageSplit, shape: ModelBackbone) -> float | None:
    """Seconds that one core takes to read and preprocess a sample: the mean of a few from all over the split."""
    laps: list[float] = []
    for row in np.unique(np.linspace(0, len(images) - 1, _DECODED, dtype=np.int64)):
        started = time.perf_counter()
        try:
            preprocess(shape.transform, images[int(row)], images.ids[row])
        except DecodeError:
            continue
        laps.append(time.perf_counter() - started)
        if sum(laps) > 2 * _SECONDS:
            break
    return mean(laps[1:] or laps) if laps else None  # the first one warms up


def forward_seconds(shape: ModelBackbone, layer: int, config: ExtractConfig) -> float:
    """Seconds of a sample up to and with block `layer`, at the rate (operations a second) of the first block."""
    block = shape.trainable_copy(1)
    share = _forward_flops(shape, layer) / _forward_flops(block, 0)
    _fill(block.module)
    forward = FrozenForward(block, [0], "all", config)

    def seconds(n: int) -> float:
        images = torch.randn(n, *shape.image_size, device=forward.device)
        return _lap(lambda: forward(images), forward.device) / n

    one = seconds(1)
    n = max(1, int(_SECONDS / one))
    n = min(n, forward.batch_size(n))
    return share * (seconds(n) if n > 1 else one)


def _fill(module: nn.Module) -> None:
    """From the meta device to the CPU, with values that a forward pass can bear."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in module.buffers():  # some hold indices, of which only zero is sure to be legal
        buffer.zero_()


def _forward_flops(backbone: ModelBackbone, layer: int) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.tokens(torch.zeros(1, *backbone.image_size), [layer])
    return int(counter.get_total_flops())


def _training_flops(planned: Planned, method: MethodConfig) -> int:
    shape, options = planned.shape, method.trials[0].options
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(method.name, planned.spec, len(planned.schema.classes), options, shape)
        model(torch.zeros(1, *shape.image_size)).sum().backward()
    return int(counter.get_total_flops())


def _store_seconds(planned: Planned) -> tuple[float, float | None, dict[str, float]]:
    """Seconds a sample to encode, to write, and of a step by feature source; all grow with the number of layers."""
    config, device = planned.config, resolve_device(planned.config.train.device)
    used = _layers_of(planned.cached, planned.spec)
    small = _small_schema(planned.schema, used, planned.cached.batch_size, _BYTES.get(device.type, _BYTES["cpu"]))
    path = local_path(store_url(config.store.path))
    with tempfile.TemporaryDirectory(prefix=".sidecache-plan-", dir=_writable_folder(path)) as folder:
        encode, write = _fill_store(folder, small, resolve_device(config.extract.device))
        streamed = StreamedFeatures(open_store(folder), device)
        sources: list[Features] = [ResidentFeatures(streamed, small.layers), *([] if path is None else [streamed])]
        more = len(used) / len(small.layers)
        steps = {source.kind: more * _step_seconds(source, planned.cached, config) for source in sources}
    more = len(planned.schema.layers) / len(small.layers)
    return more * encode, None if path is None else more * write, steps


def _layers_of(method: MethodConfig, spec: FeatureSpec) -> tuple[int, ...]:
    with torch.device("meta"):
        layers: tuple[int, ...] = build_model(method.name, spec, 2, method.trials[0].options).layers  # type: ignore[assignment]
    return layers


def _small_schema(schema: Schema, layers: tuple[int, ...], batch_size: int, n_bytes: int) -> Schema:
    """A store of one shard, of a few samples and, where one of these is too large, of the last few layers."""
    a_layer = schema.bytes_per_sample // len(schema.layers)
    few = layers[-max(1, n_bytes // a_layer) :]
    samples = max(1, min(_BATCHES * batch_size, n_bytes // (a_layer * len(few))))
    splits = {"train": SplitInfo(num_samples=samples)}
    tailless = schema.provenance.model_copy(update={"preprocessing": ""})  # to be read through a plain norm
    shrunk = {"layers": few, "splits": splits, "shard_samples": samples, "views": 1, "tail_tensors": ()}
    return schema.model_copy(update=shrunk | {"provenance": tailless})


def _writable_folder(path: Path | None) -> Path | None:
    """A folder on the disk of the store; None, for the system's own, where there is none to write to."""
    existing = next((parent for parent in path.parents if parent.is_dir()), None) if path else None
    return existing if existing and os.access(existing, os.W_OK) else None


def _fill_store(folder: str, schema: Schema, device: torch.device) -> tuple[float, float]:
    """Write random samples; seconds a sample to encode and to write."""
    rows = schema.splits["train"].num_samples
    size = (rows, schema.token_layout.num_tokens, schema.dim)
    tokens = {layer: torch.randn(size, device=device) for layer in schema.layers}
    rms = {layer: np.ones(schema.dim, np.float32) for layer in schema.layers} if schema.dtype == "int8" else {}
    ids = tuple(map(str, range(rows)))
    labels = np.zeros((rows, len(schema.classes)), np.uint8) if schema.multi_label else np.zeros(rows, np.int64)
    target = KeyValueStore(store_url(folder))
    create_store(target, schema, {"train": Listing(ids, labels, np.zeros((rows, 16), np.uint8))}, rms, {})
    on_device = {layer: torch.from_numpy(values).to(device) for layer, values in rms.items()}
    Encoding(tokens, ids, schema.dtype, on_device).result()  # a first time takes longer
    started = time.perf_counter()
    encoded = Encoding(tokens, ids, schema.dtype, on_device).result()
    done = time.perf_counter()
    StoreWriter(target, schema).commit("train", 0, encoded, np.full(rows, STORED, np.uint8))
    return (done - started) / rows, (time.perf_counter() - done) / rows


def _step_seconds(features: Features, method: MethodConfig, config: Config) -> float:
    """Seconds a sample of an epoch of the training loop."""
    trial, labels = method.trials[0], features.labels("train")
    options = trial.options.model_copy(update={"layers": "all"} if "layers" in type(trial.options).model_fields else {})
    model = build_model(method.name, features.spec, features.num_classes, options)
    candidate = Candidate(model, trial.lr or config.train.lr, trial.weight_decay)
    objective = make_objective(labels, features.num_classes, features.multi_label, balance_classes=False)
    settings, rows = replace(settings_of(config, method, 0), epochs=1), np.arange(len(labels))
    task = TrainingTask(features=features, rows=rows, val_rows=rows[:1], objective=objective)
    seconds = _lap(lambda: fit([candidate], task, settings), features.device)
    return seconds / len(rows)


def _lap(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the median of a few after one that warms up, which alone counts if it takes long on a CPU."""
    laps = [_seconds(work, device)]
    if laps[0] > _SECONDS and device.type == "cpu":
        return laps[0]
    while sum(laps[1:]) < _SECONDS:
        laps.append(_seconds(work, device))
    return median(laps[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
