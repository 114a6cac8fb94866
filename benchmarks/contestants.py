"""Builds the models that `training.py` compares, the features or images that they train from, and their epochs."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn
from torch.nn import functional as F

from adapt.features.cached import ResidentFeatures, StreamedFeatures
from adapt.features.image_batches import ImageBatches
from adapt.features.online import OnlineFeatures
from adapt.features.specs import spec_of_backbone
from adapt.methods.registry import METHODS, build_model
from adapt.training.batch_order import epoch_batches
from adapt.training.candidate import Candidate
from adapt.training.loop import Loop, TrainingPass
from adapt.training.objective import Objective
from adapt.training.seed_rows import SeedRows
from adapt.training.settings import Settings
from extract.backbones.backbone import load_backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.forward.device import autocast, synchronize
from extract.forward.frozen_forward import FrozenForward
from extract.job.extraction import extract_tokens
from extract.job.extraction_job import ExtractionJob
from extract.sources.open_source import open_source
from store.config import StoreConfig
from store.reader import open_store

FROM_CACHE, RESIDENT, ONLINE, PEFT = "losa from the cache", "losa resident", "losa online", "peft lora"
WIDE_LOSA: dict[str, Any] = {"rank": 64, "token_rank": 8, "layers": "all"}
NARROW, NARROW_RANK = "losa of rank 16 from the cache", 16
FROM_STORE = (FROM_CACHE, NARROW, RESIDENT)
CONTESTANTS = (*FROM_STORE, ONLINE, PEFT, "lora", "full")
RANK = 4  # of peft's LoRA: the default of our `lora`
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}  # of `--small`


class Contestant(NamedTuple):
    """A model, what it is trained from, and the name of its method; none for peft's."""

    model: nn.Module
    inputs: Any
    method: str | None


class Bench:
    """Photographs, a backbone and a store of its tokens, in one folder."""

    def __init__(self, folder: Path, samples: int, args: argparse.Namespace) -> None:
        self.store = str(folder / "cache.zarr")
        self._data = DataConfig(source="folder", root=folder / "images")
        if samples:
            draw_photographs(folder / "images", samples)
        size: dict[str, Any] = dict(SMALL) if args.small else {}
        self.device = torch.device(args.device)
        self._config = ExtractConfig(device=args.device, precision=args.precision)
        self._backbone = BackboneConfig(name=args.model, weights="random", image_size=224, model_kwargs=size)

    def extract(self) -> None:
        """Fill the store."""
        store = StoreConfig(path=self.store, dtype="int8")
        source, backbone = open_source(self._data), load_backbone(self._backbone)
        extract_tokens(
            ExtractionJob(source=source, backbone=backbone, data=self._data, store=store, extract=self._config)
        )

    def contestant(self, name: str) -> Contestant:
        """A model and its inputs; nothing that only the others need is opened."""
        if name in FROM_STORE:
            streamed = StreamedFeatures(open_store(self.store), self.device)
            resident = ResidentFeatures(streamed, streamed.spec.layers) if name == RESIDENT else None
            options = WIDE_LOSA | ({"rank": NARROW_RANK} if name == NARROW else {})
            return Contestant(build("losa", streamed.spec, **options), resident or streamed, "losa")
        source, backbone = open_source(self._data), load_backbone(self._backbone)
        if name == ONLINE:
            forward = FrozenForward(backbone, range(backbone.depth), "all", self._config)
            online = OnlineFeatures(source, forward, "all")
            return Contestant(build("losa", online.spec, **WIDE_LOSA), online, "losa")
        rows = {"train": np.arange(len(source.splits["train"]))}
        images = ImageBatches(source=source, backbone=backbone, device=self.device, rows=rows)
        if name == PEFT:
            module: Any = backbone.module
            module.requires_grad_(requires_grad=False)
            module.reset_classifier(2)
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"]), module)
            return Contestant(module.to(self.device), images, None)
        model = build(name, spec_of_backbone(backbone, range(backbone.depth)), backbone=backbone)
        return Contestant(model, images, name)


def draw_photographs(root: Path, samples: int) -> None:
    """Write images of 256 x 256 pixels of noise: like photographs, they are resized and cropped to 224."""
    draw = np.random.default_rng(0)
    for number in range(samples + 2):
        split, name = ("test", "ab"[number % 2]) if number >= samples else ("train", "ab"[number % 2])
        (folder := root / split / name).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"{number:05d}.jpg")


def build(name: str, spec: Any, backbone: Any = None, **options: Any) -> nn.Module:
    """An untrained model of a method."""
    return build_model(name, spec, 2, METHODS[name].options(**options), backbone=backbone)


class FirstRows:
    """The first rows of the training split; see `adapt.training.batches.Batches`."""

    def __init__(self, inputs: Any, count: int) -> None:
        self._inputs, self._count = inputs, count
        self.device, self.views = inputs.device, inputs.views

    def labels(self, split: str) -> torch.Tensor:
        """See `Batches.labels`."""
        labels: torch.Tensor = self._inputs.labels(split)[: self._count]
        return labels

    def samples_at_once(self, layers: Any) -> int:
        """See `Batches.samples_at_once`."""
        return int(self._inputs.samples_at_once(layers))

    def part_size(self, layers: Any) -> int:
        """See `Batches.part_size`."""
        return int(self._inputs.part_size(layers))

    def for_epoch(self, seed: int, epoch: int) -> "FirstRows":
        """See `Batches.for_epoch`."""
        return self

    def batches(self, split: str, groups: Any, layers: Any, together: int = 1) -> Iterator[tuple[np.ndarray, Any]]:
        """See `Batches.batches`."""
        batches: Iterator[tuple[np.ndarray, Any]] = self._inputs.batches(split, groups, layers, together)
        return batches


class Epochs:
    """Epochs of a model over some rows: by sidecache's loop, and by a plain one over the same batches for peft.

    Args:
        contestant: the model and its inputs.
        rows: number of the first rows of the training split that are trained on.
        batch: rows of a step.
        precision: of autocast.
    """

    def __init__(self, contestant: Contestant, rows: int, batch: int, precision: str) -> None:
        self._model, self._precision = contestant.model.train(), precision
        self._inputs, self.device, self.rows = FirstRows(contestant.inputs, rows), contestant.inputs.device, rows
        self._groups = epoch_batches(rows, math.ceil(rows / batch), epoch=0)
        self._loop = None
        if contestant.method:
            every = np.arange(rows)
            data = SeedRows(seed=0, rows=every, val_rows=every[:0], objective=Objective(multi_label=False))
            candidate = Candidate(contestant.model, 1e-3, 0.01, data=data, method=contestant.method)
            settings = Settings(epochs=1000, batch_size=batch, precision=precision)
            self._loop = Loop(TrainingPass(candidates=[candidate], inputs=self._inputs, settings=settings))
        else:
            trained = [tensor for tensor in contestant.model.parameters() if tensor.requires_grad]
            self._optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def run(self) -> None:
        """Train one epoch, and wait for the GPU."""
        if self._loop:
            for _ in self._loop.train(0):
                pass
            self._loop.settle()
        else:
            self._run_plainly()
        synchronize(self.device)

    def _run_plainly(self) -> None:
        for rows, images in self._inputs.batches("train", self._groups, []):
            with autocast(self.device, self._precision):
                logits = self._model(images).float()
            labels = self._inputs.labels("train")[rows].to(self.device)
            F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
