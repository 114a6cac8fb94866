"""What a dask worker does: loads the frozen backbone once, then extracts whole shards and makes their values durable.

It marks nothing: that is for the job that holds the store's lock. Before each write it looks whether its job still
does, so that a worker which outlived its job, or slept, leaves the store alone.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from distributed import Worker, WorkerPlugin, get_worker
from distributed.utils import sync
from jaxtyping import UInt8

from extract.backbones.backbone import Backbone, digests, load_backbone
from extract.config import BackboneConfig, ClipConfig, ExtractConfig
from extract.forward.frozen_forward import FrozenForward
from extract.job.shard import ShardExtractor
from extract.sources.open_source import ImageSplit
from extract.sources.videos import decoder_info
from store.address import store_url
from store.arrays import read_rms
from store.config import Tokens
from store.errors import JobError
from store.kvstore import KeyValueStore
from store.lock import Watch
from store.schema import Schema
from store.writer import StoreWriter


@dataclass(frozen=True)
class Work:
    """All that a worker must know of a job.

    Attributes:
        splits: the samples, in the order of the store; their files must be reachable from every worker.
        recipe: what the backbone is loaded from; where there is none, `backbone` itself travels.
        owner: the id of the job's lock.
        marks: where marks and digests go, if these are layers on their way into a store (`store.growing`).
        threads: how many torch may use; None leaves that to the worker.
    """

    store: str
    schema: Schema
    splits: dict[str, ImageSplit]
    skip: bool
    owner: str
    config: ExtractConfig
    tokens: Tokens
    recipe: BackboneConfig | None
    clips: ClipConfig | None
    backbone: Backbone | None
    marks: str = ""
    threads: int | None = None


class Extractor(WorkerPlugin):
    """A job's work, as every worker of the cluster is given it, those that come later included."""

    def __init__(self, name: str, work: Work) -> None:
        self.name, self._work = name, work

    def setup(self, worker: Worker) -> None:
        """See `WorkerPlugin`."""
        self._worker, self._mutex = worker, Lock()

    def extract(self, split: str, number: int) -> None:
        """Compute one shard, and write it; workers of several threads take turns.

        The job hears of start and end by events: a task's result would stay with the worker, and be lost with it.

        Raises:
            UserError, JobError: as of `ShardExtractor.extract` and `StoreWriter.write`; or this worker's files,
                weights or precision are not those of the job.
        """
        shard = {"split": split, "shard": number, "worker": self._worker.address}
        with self._mutex:
            self._tell(shard)
            self._tell(shard | {"written": self._hand.extract(split, number)})

    def _tell(self, message: dict[str, Any]) -> None:
        """Returns when the scheduler has it; `Worker.log_event` would leave it in a buffer, to be lost with us."""
        sync(self._worker.loop, self._worker.scheduler.log_event, topic=self.name, msg=message)

    @cached_property
    def _hand(self) -> "_Hand":
        return _Hand(self._work, self._worker.name)  # by the first task: `setup` would stop heartbeats meanwhile


def extract_on_worker(name: str, split: str, number: int) -> None:
    """The task of a shard; `name` is that of the job's plugin."""
    plugin = get_worker().plugins[name]
    assert isinstance(plugin, Extractor)
    plugin.extract(split, number)


class _Hand:
    """The backbone, loaded and checked to be the job's."""

    def __init__(self, work: Work, worker_name: Any) -> None:
        if work.threads:
            torch.set_num_threads(work.threads)
        backbone = work.backbone or load_backbone(work.recipe, work.clips)  # type: ignore[arg-type]
        config = work.config.model_copy(update={"device": _device(work.config.device, worker_name)})
        forward = FrozenForward(backbone, work.schema.layers, work.tokens, config)
        _require_same(work.schema, {**digests(backbone), "precision": forward.precision, **_decoder(work.schema)})
        self._folder, self._work = KeyValueStore(store_url(work.store)), work
        self._folder.stay_on_disk()
        self._digests: dict[str, UInt8[np.ndarray, "samples 16"]] = {}
        self._writer = StoreWriter(self._folder, work.schema, Watch(self._folder, work.owner), work.marks)
        self._extractor = ShardExtractor(
            work.splits, forward, work.schema, read_rms(self._folder, work.schema), work.skip
        )

    def extract(self, split: str, number: int) -> dict[str, Any]:
        self._check_samples(split, number)
        [shard] = self._extractor.extract(split, [number])
        self._writer.write(split, number, shard.tokens, shard.status)
        return {"status": shard.status.tolist(), "skipped": shard.skipped, "forward_seconds": shard.forward_seconds}

    def _check_samples(self, split: str, number: int) -> None:
        """This machine may have other files in the same places."""
        if split not in self._digests:
            self._digests[split] = self._folder.read_array(f"{split}/sample_digest")
        samples, known = self._work.splits[split], self._digests[split]
        for row in self._work.schema.shards(split).rows(number):
            if samples.digest(row) != known[row].tobytes():
                raise JobError(
                    f"sample {samples.ids[row]!r} of {split} is not on this worker what it was when the job listed it; "
                    "all workers must see the same files"
                )


def _require_same(schema: Schema, found: dict[str, str]) -> None:
    for name, value in found.items():
        if (wanted := getattr(schema.provenance, name)) != value:
            raise JobError(
                f"this worker's {name} is {value}, the job's is {wanted}; all workers must have the same weights, "
                "libraries and kind of device (or name extract.device and extract.precision)"
            )


def _decoder(schema: Schema) -> dict[str, str]:
    return {"decoder_digest": decoder_info().digest} if schema.provenance.decoder_digest else {}


def _device(device: str, worker_name: Any) -> str:
    """Workers that see several GPUs take one each, by their number: names are 3, NAME-3, or an address without one."""
    n_gpus, number = torch.cuda.device_count(), re.fullmatch(r"(?:.*-)?(\d+)", str(worker_name))
    if device not in ("auto", "cuda") or n_gpus < 2 or not number:
        return device
    return f"cuda:{int(number[1]) % n_gpus}"
