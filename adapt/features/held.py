"""Features of some samples in memory, as stores of several configurations would give them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from adapt.features.feature_source import Rows
from adapt.features.frozen import FrozenFeatures
from adapt.features.specs import spec_of_backbone
from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from extract.backbones.backbone import Backbone, reduce_tokens
from extract.forward.encoding import Encoding, rounding_error
from extract.job.extraction_job import ExtractionJob
from extract.job.rms_calibration import calibrate
from extract.job.shard_extractor import report_failures
from store.config import Dtype, StoreConfig
from store.console.progress import progress
from store.dtypes import CODES, Encoded, decode
from store.layout import in_groups, resolve_layers


@dataclass(frozen=True)
class HeldLayer:
    """The stored values of a layer, (samples, tokens, width), with scales of tokens (int8) and the RMS of channels."""

    values: Tensor
    scale: Tensor | None = None
    rms: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[Encoded], rms: Tensor | None) -> "HeldLayer":
        """Values that were encoded part by part."""
        values = torch.from_numpy(np.concatenate([part.values for part in parts]))
        if values.dtype == torch.uint16:
            values = values.view(torch.bfloat16)
        scales = [part.scale for part in parts if part.scale is not None]
        return cls(values, torch.from_numpy(np.concatenate(scales)) if scales else None, rms)

    def to(self, device: torch.device) -> "HeldLayer":
        """The same values on a device."""
        return HeldLayer(*(None if part is None else part.to(device) for part in (self.values, self.scale, self.rms)))  # type: ignore[arg-type]

    def decode(self, rows: Rows) -> Tensor:
        """The tokens of some rows, float32, on the device of the values."""
        index = torch.from_numpy(rows).to(self.values.device)
        decoded: Tensor = decode(self.values[index], None if self.scale is None else self.scale[index], self.rms)
        return decoded


@dataclass(frozen=True)
class HeldLabels:
    """Labels of samples; with several views, one for every row."""

    values: Shaped[Tensor, "rows ..."]
    num_classes: int
    multi_label: bool = False
    views: int = 1


class HeldFeatures(FrozenFeatures):
    """Some samples of one split in memory; see `adapt.features.feature_source.Features`.

    Args:
        spec: layers and shape of the tokens.
        tokens: the values of every layer, all on one device.
        labels: of the samples.
        dtype: the format of the values.
    """

    kind = "held"

    def __init__(
        self, spec: FeatureSpec, tokens: Mapping[int, HeldLayer], labels: HeldLabels, dtype: Dtype = "float32"
    ) -> None:
        self.spec, self.tokens, self.held_labels, self._dtype = spec, tokens, labels, dtype
        self.num_classes, self.multi_label, self.views = labels.num_classes, labels.multi_label, labels.views
        self.device = next(iter(tokens.values())).values.device

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self.held_labels.values

    def validation_rows(self) -> None:
        """See `Features.validation_rows`; validation is drawn, whether the source has a split for it or not."""
        return

    def batches(
        self, split: str, groups: Sequence[Rows], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[Rows, TokensByLayer]]:
        """See `Features.batches`."""
        for rows in groups:
            yield rows, {layer: self.tokens[layer].decode(rows) for layer in layers}

    def rounding(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Features.rounding`: that of the frozen forward and of the stored format."""
        return super().rounding(layer, tokens) + rounding_error(tokens, self._dtype, self.tokens[layer].rms)


def hold(
    job: ExtractionJob, rows: Rows, stores: Mapping[str, StoreConfig], *, device: torch.device, split: str = "train"
) -> dict[str, HeldFeatures]:
    """Run some samples through the backbone once, and hold what each of several stores would give of them.

    Args:
        job: its `store` is not read.
        rows: of the split, ascending; whole samples if they have several views.
        stores: layers, tokens and dtype of each, by name. They share the RMS of channels, over all tokens.
        device: of the features.
        split: name of the split.

    Raises:
        UserError: a sample cannot be decoded (`on_error: fail`); the backbone has no such layers or tokens.
        JobError: a value cannot be stored.
    """
    source, images = job.source, job.source.splits[split]
    job = replace(job, store=job.store.model_copy(update={"tokens": "all"}))
    shelves = {name: _Shelf(store, job.backbone) for name, store in stores.items()}
    forward = job.forward(sorted({layer for shelf in shelves.values() for layer in shelf.layers}))
    rms = {k: torch.from_numpy(values).to(forward.device) for k, values in calibrate(job, forward.layers).items()}
    held: list[int] = []
    with progress("reading samples", len(rows), "samples") as advance:
        for batch in forward.batches(images, in_groups(rows.tolist(), forward.batch_size(len(rows)))):
            report_failures(batch, images, job.skips_undecodable)
            if batch.images is not None:
                tokens, ids = forward(batch.images), [images.ids[row] for row in batch.rows]
                for shelf in shelves.values():
                    shelf.add(tokens, ids, rms)
                held += batch.rows
            advance(len(batch.rows) + len(batch.failed))
    values = torch.from_numpy(np.asarray(images.labels)[held])
    labels = HeldLabels(values, len(source.classes), source.multi_label, source.views)
    return {name: shelf.features(labels, rms, device) for name, shelf in shelves.items()}


class _Shelf:
    """The tokens of a store, reduced and encoded batch by batch."""

    def __init__(self, store: StoreConfig, backbone: Backbone) -> None:
        self.layers = resolve_layers(store.layers, backbone.depth)
        self._store, self._backbone, self._parts = store, backbone, list[dict[int, Encoded]]()

    def add(self, tokens: TokensByLayer, ids: Sequence[str], rms: Mapping[int, Tensor]) -> None:
        """Reduce and encode the tokens of a batch."""
        layout, kept = self._backbone.layout, self._store.tokens
        reduced = {layer: reduce_tokens(tokens[layer], layout, kept) for layer in self.layers}
        self._parts.append(Encoding(reduced, ids, self._store.dtype, rms).result())

    def features(self, labels: HeldLabels, rms: Mapping[int, Tensor], device: torch.device) -> HeldFeatures:
        """What was added, on a device."""
        dtype = self._store.dtype
        tokens = {
            layer: HeldLayer.of([part[layer] for part in self._parts], rms[layer] if dtype in CODES else None)
            for layer in self.layers
        }
        spec = spec_of_backbone(self._backbone, self.layers, self._store.tokens)
        return HeldFeatures(spec, {layer: held.to(device) for layer, held in tokens.items()}, labels, dtype)
