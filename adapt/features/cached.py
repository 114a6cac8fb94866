"""Features from a store: streamed (read batch by batch) or resident (the training split in memory).

A split that the store lacks is computed when it is read (`adapt.features.unstored`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from adapt.features.feature_source import Rows
from adapt.features.frozen import FrozenFeatures
from adapt.features.specs import spec_of_store
from adapt.features.unstored import UnstoredSplits
from adapt.methods.feature_spec import TokensByLayer
from extract.forward.device import to_device
from extract.forward.encoding import rounding_error
from store.augmented_rows import augmented_rows
from store.console.progress import progress
from store.dtypes import Encoded, decode
from store.layout import in_groups
from store.reader import Store
from store.schema import AUGMENTED

_PREFETCH = 2  # batches read ahead of the one in use
_LOAD_ROWS = 64

Stored = tuple[Tensor, Tensor | None]  # values of a layer as they are stored, and their scales
HeldTokens = dict[int, Stored]  # by layer


class StreamedFeatures(FrozenFeatures):
    """Batches read from the store, two ahead of the one in use.

    Args:
        store: a complete store.
        device: of the batches.
        layers: some of its layers; all by default.
        unstored: splits that it lacks.

    Raises:
        JobError: shards of the store are missing.
    """

    kind = "streamed"

    def __init__(
        self,
        store: Store,
        device: torch.device,
        layers: Sequence[int] | None = None,
        unstored: UnstoredSplits | None = None,
    ) -> None:
        store.require_complete()
        self.store, self.device, self.views, self.unstored = store, device, store.schema.views, unstored
        self.spec = spec_of_store(store, layers)
        self.num_classes, self.multi_label = len(store.classes), store.schema.multi_label
        self.view_rows = augmented_rows(store)
        self._rms = {layer: torch.from_numpy(rms).to(device) for layer, rms in store.rms.items()}

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        if self.unstored and split not in self.store.splits:
            return self.unstored.labels(split)
        return torch.from_numpy(self.store.labels(split))

    def validation_rows(self) -> Rows | None:
        """See `Features.validation_rows`."""
        return self.store.validation_rows()

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`; a split that is not stored is read whole, in order."""
        if self.unstored and split not in self.store.splits:
            yield from self._compute(self.unstored, split, groups, layers)
            return
        ahead = _PREFETCH if together == 1 else 1  # a window of several groups takes as much memory as many batches
        windows, pending = in_groups(groups, together), deque[Any]()
        for position, window in enumerate(windows):
            for later in windows[position + len(pending) : position + 1 + ahead]:
                pending.append(self.store.fetch(split, _in_order_of_store(later), layers))
            # Nothing refers to the stored values once they are decoded: a later batch is read into their memory.
            yield from self._decode_window(window, pending.popleft().result())

    def _compute(
        self, unstored: UnstoredSplits, split: str, groups: Sequence[Rows], layers: Sequence[int]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """The groups of a split that is not stored, cut from the shards that the store would have."""
        assert np.array_equal(np.concatenate(groups), np.arange(len(unstored.rows(split))))
        shards = ({k: _tensors(v) for k, v in shard.items()} for shard in unstored.shards(split, layers))
        held = next(shards)
        for rows in groups:
            while _n_rows(held) < len(rows):
                shard = next(shards)
                held = {layer: _joined(stored, shard[layer]) for layer, stored in held.items()}
            yield rows, {layer: self.decode(layer, *_cut(stored, slice(len(rows)))) for layer, stored in held.items()}
            held = {layer: _cut(stored, slice(len(rows), None)) for layer, stored in held.items()}

    def _decode_window(
        self, window: Sequence[Rows], read: Mapping[int, Encoded]
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        parts = {layer: _tensors(encoded) for layer, encoded in read.items()}
        del read
        if len(window) == 1:
            yield window[0], {layer: self.decode(layer, *parts.pop(layer)) for layer in list(parts)}
            return
        positions = torch.split(_positions_in_store_order(window), [len(rows) for rows in window])
        for rows, position in zip(window, positions, strict=True):
            yield rows, {layer: self.decode(layer, *_pick(stored, position)) for layer, stored in parts.items()}

    def decode(self, layer: int, values: Tensor, scale: Tensor | None) -> Tensor:
        """Convert stored values of a layer to float32 on the device."""
        scale = None if scale is None else to_device(scale, self.device)
        decoded: Tensor = decode(to_device(values, self.device), scale, self._rms.get(layer))
        return decoded

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`: that of the frozen forward and of the stored format."""
        return super().rounding(layer, tokens) + rounding_error(tokens, self.store.schema.dtype, self._rms.get(layer))


class ResidentFeatures(FrozenFeatures):
    """The stored values of the training samples in memory, in all their views, decoded batch by batch.

    Other splits are read once, so they are streamed, or computed if they are not stored.

    Args:
        streamed: the features to load.
        layers: which of their layers.
    """

    kind = "resident"

    def __init__(self, streamed: StreamedFeatures, layers: Sequence[int]) -> None:
        self._streamed = streamed
        self.spec, self.device, self.views = streamed.spec, streamed.device, streamed.views
        self.num_classes, self.multi_label = streamed.num_classes, streamed.multi_label
        self.view_rows = streamed.view_rows
        self._layers, self._held = layers, dict[str, HeldTokens]()

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self._streamed.labels(split)

    def validation_rows(self) -> Rows | None:
        """See `Features.validation_rows`."""
        return self._streamed.validation_rows()

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        if split not in ("train", AUGMENTED):
            yield from self._streamed.batches(split, groups, layers, together)
            return
        for rows in groups:
            index = to_device(torch.from_numpy(rows), self.device)
            yield rows, {layer: self._decode(split, layer, index) for layer in layers}

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`."""
        return self._streamed.rounding(layer, tokens)

    def _decode(self, split: str, layer: int, index: Tensor) -> Tensor:
        if split not in self._held:  # loaded when it is first read: a job whose workers train needs none
            self._held[split] = self._load(split, self._layers)
        return self._streamed.decode(layer, *_pick(self._held[split][layer], index))

    def _load(self, split: str, layers: Sequence[int]) -> HeldTokens:
        """Read a split onto the device."""
        store = self._streamed.store
        total, loaded = store.num_samples(split), HeldTokens()
        with progress("loading features", total, "samples") as advance:
            for rows in in_groups(np.arange(total), _LOAD_ROWS):
                for layer, encoded in store.fetch(split, rows, layers).result().items():
                    parts = _tensors(encoded)
                    if layer not in loaded:
                        values, scale = (self._empty_like(part, total) for part in parts)
                        assert values is not None
                        loaded[layer] = values, scale
                    for whole, part in zip(loaded[layer], parts, strict=True):
                        if whole is not None and part is not None:
                            whole[rows[0] : rows[-1] + 1] = part.to(self.device)
                advance(len(rows))
        return loaded

    def _empty_like(self, part: Tensor | None, total: int) -> Tensor | None:
        """Memory for `total` rows like those of `part`."""
        return None if part is None else torch.empty(total, *part.shape[1:], dtype=part.dtype, device=self.device)


def _in_order_of_store(window: Sequence[Rows]) -> Rows:
    """Sort the rows of several groups, since the store reads neighbors together; one group keeps its order."""
    return np.sort(np.concatenate(window)) if len(window) > 1 else window[0]


def _positions_in_store_order(window: Sequence[Rows]) -> Int[Tensor, "_"]:
    """For every row of several groups, its position among the sorted rows of them all."""
    order = np.argsort(np.concatenate(window))
    positions = np.empty_like(order)
    positions[order] = np.arange(len(order))
    return torch.from_numpy(positions)


def _pick(stored: Stored, positions: Tensor) -> Stored:
    values, scale = stored
    return values[positions], None if scale is None else scale[positions]


def _cut(stored: Stored, rows: slice) -> Stored:
    values, scale = stored
    return values[rows], None if scale is None else scale[rows]


def _joined(stored: Stored, more: Stored) -> Stored:
    (values, scale), (more_values, more_scale) = stored, more
    scales = None if scale is None or more_scale is None else torch.cat([scale, more_scale])
    return torch.cat([values, more_values]), scales


def _n_rows(held: Mapping[int, Stored]) -> int:
    return len(next(iter(held.values()))[0])


def _tensors(encoded: Encoded) -> Stored:
    values = torch.from_numpy(encoded.values)
    if values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    return values, None if encoded.scale is None else torch.from_numpy(encoded.scale)
