"""Feature sources that give the same numbers: resident (in memory), streamed (from the store), online (not stored)."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from adapt.readout import Readout
from adapt.spec import FeatureSpec, TokensByLayer
from extract.backbone import Backbone
from extract.forward import FrozenForward
from extract.sources import ImageSource
from extract.tail import Tail, tail_from_arrays
from store.config import Tokens
from store.errors import UserError
from store.formats import Encoded, decode
from store.layout import reduced_layout
from store.progress import progress
from store.reader import Store

Rows = Int[np.ndarray, "_"]
_PREFETCH = 2  # batches read ahead of the one in use
_LOAD_ROWS = 64
_SHARE_OF_MEMORY = 0.5  # of what is free, that resident features may take: training needs the rest


@runtime_checkable
class Features(Protocol):
    """Tokens and labels by row, from wherever they come."""

    kind: str
    spec: FeatureSpec
    num_classes: int
    multi_label: bool
    device: torch.device

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Class indices (samples,), or multi-label 0/1 (samples, classes)."""
        ...

    def batches(self, split: str, groups: Sequence[Rows], layers: Sequence[int]) -> Iterator[tuple[Rows, Any]]:
        """For every group of rows, in order: (rows, {layer: (rows, tokens, dim) float32 on the device})."""
        ...


class StreamedFeatures:
    """Batches read from the store, two ahead of the one in use."""

    kind = "streamed"

    def __init__(self, store: Store, device: torch.device, layers: Sequence[int] | None = None) -> None:
        store.require_complete()
        self.store, self.device = store, device
        self.spec = spec_of_store(store, layers)
        self.num_classes, self.multi_label = len(store.classes), store.schema.multi_label
        self._rms = {layer: torch.from_numpy(rms).to(device) for layer, rms in store.rms.items()}

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return torch.from_numpy(self.store.labels(split))

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        pending: deque[Any] = deque()
        for position, rows in enumerate(groups):
            for ahead in groups[position + len(pending) : position + 1 + _PREFETCH]:
                pending.append(self.store.fetch(split, ahead, layers))
            encoded = pending.popleft().result()
            yield rows, {layer: self.decode(layer, *_tensors(part)) for layer, part in encoded.items()}

    def decode(self, layer: int, values: Tensor, scale: Tensor | None) -> Tensor:
        """Stored values of a layer to float32 on the device."""
        scale = None if scale is None else scale.to(self.device)
        decoded: Tensor = decode(values.to(self.device), scale, self._rms.get(layer))
        return decoded


class ResidentFeatures:
    """The training split's stored values in memory, decoded batch by batch; other splits are read once, streamed."""

    kind = "resident"

    def __init__(self, streamed: StreamedFeatures, layers: Sequence[int]) -> None:
        self._streamed = streamed
        self.spec, self.device = streamed.spec, streamed.device
        self.num_classes, self.multi_label = streamed.num_classes, streamed.multi_label
        self._train = self._load(layers)

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self._streamed.labels(split)

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        if split != "train":
            yield from self._streamed.batches(split, groups, layers)
            return
        for rows in groups:
            index = torch.from_numpy(rows).to(self.device)
            yield rows, {layer: self._decode(layer, index) for layer in layers}

    def _decode(self, layer: int, index: Tensor) -> Tensor:
        values, *scale = (part[index] for part in self._train[layer])
        return self._streamed.decode(layer, values, scale[0] if scale else None)

    def _load(self, layers: Sequence[int]) -> dict[int, list[Tensor]]:
        store = self._streamed.store
        total = store.num_samples("train")
        loaded: dict[int, list[Tensor]] = {}
        with progress("loading features", total, "samples") as advance:
            for start in range(0, total, _LOAD_ROWS):
                rows = np.arange(start, min(start + _LOAD_ROWS, total))
                for layer, encoded in store.fetch("train", rows, layers).result().items():
                    parts = [part for part in _tensors(encoded) if part is not None]
                    if layer not in loaded:
                        shapes = [(total, *part.shape[1:]) for part in parts]
                        pairs = zip(parts, shapes, strict=True)
                        loaded[layer] = [torch.empty(s, dtype=p.dtype, device=self.device) for p, s in pairs]
                    for whole, part in zip(loaded[layer], parts, strict=True):
                        whole[start : start + len(rows)] = part.to(self.device)
                advance(len(rows))
        return loaded


class OnlineFeatures:
    """The frozen backbone itself, run anew for every batch; nothing is stored."""

    kind = "online"

    def __init__(
        self, source: ImageSource, forward: FrozenForward, tokens: Tokens, layers: Sequence[int] | None = None
    ) -> None:
        self._source, self._forward, self.device = source, forward, forward.device
        self.spec = spec_of_backbone(forward.backbone, layers or forward.layers, tokens)
        self.num_classes, self.multi_label = len(source.classes), source.multi_label

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return torch.from_numpy(np.asarray(self._source.splits[split].labels))

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        images = self._source.splits[split]
        for batch in self._forward.batches(images, [group.tolist() for group in groups]):
            if batch.failed:
                raise UserError(f"{next(iter(batch.failed.values()))} (online training cannot skip samples)")
            assert batch.images is not None
            yield np.array(batch.rows), self._forward(batch.images, layers)


class PooledFeatures:
    """What linear probes read of one layer, computed once: {pool: (batch, features)} instead of {layer: tokens}."""

    kind = "pooled"

    def __init__(self, features: Features, readouts: Sequence[Readout], layer: int) -> None:
        self._features, self.device, self.spec = features, features.device, features.spec
        self.num_classes, self.multi_label = features.num_classes, features.multi_label
        self._readouts, self._layer = {readout.mode: readout for readout in readouts}, layer
        self._kept: dict[str, dict[str, Tensor]] = {}

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self._features.labels(split)

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int]
    ) -> Iterator[tuple[Rows, Mapping[str, Tensor]]]:
        """For every group of rows: (rows, {pool: (rows, features)})."""
        assert set(layers) == {self._layer}
        for rows in groups:
            index = torch.from_numpy(rows).to(self.device)
            yield rows, {mode: values[index] for mode, values in self.whole(split).items()}

    def whole(self, split: str) -> dict[str, Float[Tensor, "samples features"]]:
        """Pooled features of a whole split by pooling mode."""
        if split not in self._kept:
            self._kept[split] = self._pool(split)
        return self._kept[split]

    @torch.no_grad()
    def _pool(self, split: str) -> dict[str, Tensor]:
        groups = in_order(len(self._features.labels(split)), _LOAD_ROWS)
        pooled: dict[str, list[Tensor]] = {mode: [] for mode in self._readouts}
        for _, tokens in self._features.batches(split, groups, [self._layer]):
            for mode, readout in self._readouts.items():
                pooled[mode].append(readout.pool(readout.normalise(tokens[self._layer])))
        return {mode: torch.cat(parts) for mode, parts in pooled.items()}


@dataclass(frozen=True)
class Choice:
    """Which feature source, and why."""

    kind: str
    reason: str


def choose_source(wanted: str, store: Store, layers: Sequence[int], device: torch.device) -> Choice:
    """Resolve `train.feature_source: auto` from the size of the training split and the memory that is free."""
    if wanted != "auto":
        return Choice(wanted, "as asked for")
    share = len(layers) / len(store.layers)
    needed = int(store.schema.bytes_per_sample * share * store.num_samples("train"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    sizes = f"{needed / 2**20:,.0f} MiB of features, {free / 2**20:,.0f} MiB of memory free"
    return Choice("resident" if needed <= _SHARE_OF_MEMORY * free else "streamed", sizes)


def spec_of_store(store: Store, layers: Sequence[int] | None = None) -> FeatureSpec:
    """What a store's tokens look like (of all its layers, or of some), with the tail that it keeps."""
    schema = store.schema
    tail = Tail(norm=nn.LayerNorm(schema.dim, elementwise_affine=False))
    if schema.tail_tensors:
        provenance = schema.provenance
        tail = tail_from_arrays(provenance.backbone, provenance.model_kwargs, store.tail_arrays())
    chosen = schema.check_layers(tuple(layers or schema.layers))
    return FeatureSpec(chosen, schema.depth, schema.dim, schema.token_layout, tail)


def spec_of_backbone(backbone: Backbone, layers: Sequence[int], tokens: Tokens = "all") -> FeatureSpec:
    """What a backbone's tokens look like; a module without a tail of its own is read through a plain LayerNorm."""
    tail = backbone.tail or Tail(norm=nn.LayerNorm(backbone.dim, elementwise_affine=False))
    return FeatureSpec(tuple(layers), backbone.depth, backbone.dim, reduced_layout(backbone.layout, tokens), tail)


def in_order(total: int, batch_size: int) -> list[Rows]:
    """Rows 0 ... total - 1 in batches."""
    return [np.arange(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]


def _tensors(encoded: Encoded) -> tuple[Tensor, Tensor | None]:
    values = torch.from_numpy(encoded.values)
    if values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    return values, None if encoded.scale is None else torch.from_numpy(encoded.scale)
