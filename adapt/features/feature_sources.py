"""Feature sources that give the same numbers: resident (in memory), streamed (from the store), online (not stored)."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from rich.filesize import decimal
from torch import Tensor

from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from extract.backbones.backbone import Backbone
from extract.backbones.pre_logits import plain_norm_pre_logits, pre_logits_from_arrays
from extract.backbones.preprocessing import is_described
from extract.forward.device import bytes_at_once, free_memory_bytes, to_device
from extract.forward.encoding import rounding_error
from extract.forward.frozen_forward import FrozenForward
from extract.sources.open_source import ImageSource
from store.config import Tokens
from store.console.progress import progress
from store.dtypes import Encoded, decode
from store.errors import UserError
from store.layout import in_groups, reduced_layout
from store.reader import Store

Rows = Int[np.ndarray, "_"]
_PREFETCH = 2  # batches read ahead of the one in use
_LOAD_ROWS = 64
# Bytes of float32 tokens that a pass holds at once; its activations take a few times as much.
_BYTES_ON_CPU, _SHARE_OF_GPU = 64 * 2**20, 1 / 24
_FORWARD_ERROR = 2.0**-18  # of a token's RMS: the rounding of a float32 forward, which depends on the batch it runs in
_SHARE_OF_MEMORY = 0.5  # of what is free, that resident features may take: training needs the rest


@runtime_checkable
class Features(Protocol):
    """Tokens and labels by row, from wherever they come."""

    kind: str
    spec: FeatureSpec
    num_classes: int
    multi_label: bool
    device: torch.device

    @property
    def views(self) -> int:
        """Consecutive rows that show the same sample."""
        ...

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """Class indices (samples,), or multi-label 0/1 (samples, classes)."""
        ...

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """How many samples a forward and backward pass may hold."""
        ...

    def for_epoch(self, seed: int, epoch: int) -> "Features":
        """What an epoch of training sees."""
        ...

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, Any]]:
        """For every group of rows, in order: (rows, {layer: (rows, tokens, dim) float32 on the device}).

        What comes from a disk may be read for so many groups `together`, in the order in which it lies there.
        """
        ...

    def rounding(self, layer: int, tokens: Float[Tensor, "rows tokens dim"]) -> Float[Tensor, "rows tokens dim"]:
        """The most by which every value of such a batch may differ from what the backbone gives the next time."""
        ...


class _Cached:
    """What all three sources share."""

    spec: FeatureSpec
    device: torch.device

    def samples_at_once(self, layers: Sequence[int]) -> int:
        """See `Features.samples_at_once`."""
        n_bytes = 4 * len(layers) * self.spec.layout.num_tokens * self.spec.dim
        return max(1, bytes_at_once(self.device, _BYTES_ON_CPU, _SHARE_OF_GPU) // n_bytes)

    def for_epoch(self, seed: int, epoch: int) -> Any:
        """See `Features.for_epoch`: frozen features are the same in every epoch."""
        return self

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`: that of the frozen forward."""
        return (_FORWARD_ERROR * tokens.square().mean(dim=-1, keepdim=True).sqrt()).expand_as(tokens)


class StreamedFeatures(_Cached):
    """Batches read from the store, two ahead of the one in use."""

    kind = "streamed"

    def __init__(self, store: Store, device: torch.device, layers: Sequence[int] | None = None) -> None:
        store.require_complete()
        self.store, self.device, self.views = store, device, store.schema.views
        self.spec = spec_of_store(store, layers)
        self.num_classes, self.multi_label = len(store.classes), store.schema.multi_label
        self._rms = {layer: torch.from_numpy(rms).to(device) for layer, rms in store.rms.items()}

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return torch.from_numpy(self.store.labels(split))

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        ahead = _PREFETCH if together == 1 else 1  # as many of these as there is memory for
        windows, pending = in_groups(groups, together), deque[Any]()
        for position, window in enumerate(windows):
            for later in windows[position + len(pending) : position + 1 + ahead]:
                pending.append(self.store.fetch(split, _in_order_of_store(later), layers))
            # Nothing refers to the stored values once they are decoded: a later batch is read into their memory.
            yield from self._decode_window(window, pending.popleft().result())

    def _decode_window(
        self, window: Sequence[Rows], read: Mapping[int, Encoded]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        parts = {layer: _tensors(encoded) for layer, encoded in read.items()}
        del read
        if len(window) == 1:
            yield window[0], {layer: self.decode(layer, *parts.pop(layer)) for layer in list(parts)}
            return
        places = torch.from_numpy(np.argsort(np.argsort(np.concatenate(window))))  # where each row came to lie
        for rows, where in zip(window, torch.split(places, [len(rows) for rows in window]), strict=True):
            yield rows, {layer: self.decode(layer, *_pick(stored, where)) for layer, stored in parts.items()}

    def decode(self, layer: int, values: Tensor, scale: Tensor | None) -> Tensor:
        """Stored values of a layer to float32 on the device."""
        scale = None if scale is None else to_device(scale, self.device)
        decoded: Tensor = decode(to_device(values, self.device), scale, self._rms.get(layer))
        return decoded

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`: that of the frozen forward and of the stored format."""
        return super().rounding(layer, tokens) + rounding_error(tokens, self.store.schema.dtype, self._rms.get(layer))


class ResidentFeatures(_Cached):
    """The training split's stored values in memory, decoded batch by batch; other splits are read once, streamed."""

    kind = "resident"

    def __init__(self, streamed: StreamedFeatures, layers: Sequence[int]) -> None:
        self._streamed = streamed
        self.spec, self.device, self.views = streamed.spec, streamed.device, streamed.views
        self.num_classes, self.multi_label = streamed.num_classes, streamed.multi_label
        self._train = self._load(layers)

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self._streamed.labels(split)

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        if split != "train":
            yield from self._streamed.batches(split, groups, layers, together)
            return
        for rows in groups:
            index = to_device(torch.from_numpy(rows), self.device)
            yield rows, {layer: self._decode(layer, index) for layer in layers}

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`."""
        return self._streamed.rounding(layer, tokens)

    def _decode(self, layer: int, index: Tensor) -> Tensor:
        values, *scale = (part[index] for part in self._train[layer])
        return self._streamed.decode(layer, values, scale[0] if scale else None)

    def _load(self, layers: Sequence[int]) -> dict[int, list[Tensor]]:
        store = self._streamed.store
        total = store.num_samples("train")
        loaded: dict[int, list[Tensor]] = {}
        with progress("loading features", total, "samples") as advance:
            for rows in in_groups(np.arange(total), _LOAD_ROWS):
                for layer, encoded in store.fetch("train", rows, layers).result().items():
                    parts = [part for part in _tensors(encoded) if part is not None]
                    if layer not in loaded:
                        shapes = [(total, *part.shape[1:]) for part in parts]
                        pairs = zip(parts, shapes, strict=True)
                        loaded[layer] = [torch.empty(s, dtype=p.dtype, device=self.device) for p, s in pairs]
                    for whole, part in zip(loaded[layer], parts, strict=True):
                        whole[rows[0] : rows[-1] + 1] = part.to(self.device)
                advance(len(rows))
        return loaded


class OnlineFeatures(_Cached):
    """The frozen backbone itself, run anew for every batch; nothing is stored."""

    kind = "online"

    def __init__(
        self, source: ImageSource, forward: FrozenForward, tokens: Tokens, layers: Sequence[int] | None = None
    ) -> None:
        self._source, self._forward, self.device = source, forward, forward.device
        self.spec = spec_of_backbone(forward.backbone, layers or forward.layers, tokens)
        self.num_classes, self.multi_label = len(source.classes), source.multi_label
        self.views = source.views

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return torch.from_numpy(np.asarray(self._source.splits[split].labels))

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        images = self._source.splits[split]
        for batch in self._forward.batches(images, [group.tolist() for group in groups]):
            if batch.failed:
                raise UserError(f"{next(iter(batch.failed.values()))} (online training cannot skip samples)")
            assert batch.images is not None
            yield np.array(batch.rows), self._forward(batch.images, layers)


@dataclass(frozen=True)
class Choice:
    """Which feature source, and why."""

    kind: str
    reason: str


def choose_source(wanted: str, needed: int, device: torch.device) -> Choice:
    """Resolve `train.feature_source: auto` from the bytes that training needs and the memory that is free."""
    if wanted != "auto":
        return Choice(wanted, "as asked for")
    free = free_memory_bytes(device)
    sizes = f"{decimal(needed)} of features, {decimal(free)} of memory free"
    return Choice("resident" if needed <= _SHARE_OF_MEMORY * free else "streamed", sizes)


def spec_of_store(store: Store, layers: Sequence[int] | None = None) -> FeatureSpec:
    """What a store's tokens look like (of all its layers, or of some), with the tail that it keeps."""
    schema, provenance = store.schema, store.schema.provenance
    tail = plain_norm_pre_logits(schema.dim)
    if schema.tail_tensors or is_described(provenance.preprocessing):  # of some named models it holds no tensor
        tail = pre_logits_from_arrays(
            provenance.backbone, provenance.model_kwargs, store.tail_arrays(), schema.prefix_sets
        )
    chosen = schema.check_layers(tuple(layers or schema.layers))
    return FeatureSpec(chosen, schema.depth, schema.dim, schema.token_layout, tail)


def spec_of_backbone(backbone: Backbone, layers: Sequence[int], tokens: Tokens = "all") -> FeatureSpec:
    """What a backbone's tokens look like; a module without a tail of its own is read through a plain LayerNorm."""
    tail, layout = backbone.tail, reduced_layout(backbone.layout, tokens)
    tail = tail.for_sets(layout.prefix_sets) if tail else plain_norm_pre_logits(backbone.dim)
    return FeatureSpec(tuple(layers), backbone.depth, backbone.dim, layout, tail)


def _in_order_of_store(window: Sequence[Rows]) -> Rows:
    """Rows of several groups as they lie in the store, which reads neighbors at once; one group keeps its order."""
    return np.sort(np.concatenate(window)) if len(window) > 1 else window[0]


def _pick(stored: tuple[Tensor, Tensor | None], places: Tensor) -> tuple[Tensor, Tensor | None]:
    values, scale = stored
    return values[places], None if scale is None else scale[places]


def _tensors(encoded: Encoded) -> tuple[Tensor, Tensor | None]:
    values = torch.from_numpy(encoded.values)
    if values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    return values, None if encoded.scale is None else torch.from_numpy(encoded.scale)
