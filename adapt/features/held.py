"""Features of some samples in memory, as stores of several configurations would give them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from adapt.features.feature_source import FrozenFeatures, Rows
from adapt.features.specs import spec_of_backbone
from adapt.methods.feature_spec import FeatureSpec, TokensByLayer
from extract.backbones.backbone import reduce_tokens
from extract.forward.encoding import Encoding, rounding_error
from extract.job.extraction_job import ExtractionJob
from extract.job.int8_calibration import calibrate
from extract.job.shard_extractor import report_failures
from store.config import Dtype, StoreConfig
from store.console.progress import progress
from store.dtypes import Encoded, decode
from store.layout import in_groups, resolve_layers


@dataclass(frozen=True)
class HeldLayer:
    """The stored values of a layer, (samples, tokens, dim), and for int8 the scales of tokens and of channels."""

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


class HeldFeatures(FrozenFeatures):
    """Some samples of one split in memory; see `adapt.features.feature_source.Features`.

    Args:
        spec: layers and shape of the tokens.
        tokens: the values of every layer, all on one device.
        labels: of the samples.
        num_classes: number of classes.
        multi_label: whether a sample may have several classes.
        views: consecutive rows that show the same sample.
        dtype: the format of the values.
    """

    kind = "held"

    def __init__(
        self,
        spec: FeatureSpec,
        tokens: Mapping[int, HeldLayer],
        labels: Shaped[Tensor, "samples ..."],
        *,
        num_classes: int,
        multi_label: bool = False,
        views: int = 1,
        dtype: Dtype = "float32",
    ) -> None:
        self.spec, self.tokens, self._labels, self._dtype = spec, tokens, labels, dtype
        self.num_classes, self.multi_label, self.views = num_classes, multi_label, views
        self.device = next(iter(tokens.values())).values.device

    def labels(self, split: str) -> Shaped[Tensor, "samples ..."]:
        """See `Features.labels`."""
        return self._labels

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
    job: ExtractionJob, rows: Rows, stores: Mapping[str, StoreConfig], device: torch.device, split: str = "train"
) -> dict[str, HeldFeatures]:
    """Run some samples through the backbone once, and hold what each of several stores would give of them.

    Args:
        job: its `store` is not read.
        rows: of the split, ascending; whole samples if they have several views.
        stores: layers, tokens and dtype of each, by name. int8 has one RMS a channel for all of them, over all tokens.
        device: of the features.
        split: name of the split.

    Raises:
        UserError: a sample cannot be decoded (`on_error: fail`); the backbone has no such layers or tokens.
        JobError: a value cannot be stored.
    """
    backbone, images = job.backbone, job.source.splits[split]
    layers = {name: resolve_layers(store.layers, backbone.depth) for name, store in stores.items()}
    job = replace(job, store=job.store.model_copy(update={"tokens": "all"}))
    forward = job.forward(sorted(set().union(*layers.values())))
    rms = {layer: torch.from_numpy(values) for layer, values in calibrate(job, forward.layers).items()}
    on_device = {layer: values.to(forward.device) for layer, values in rms.items()}
    parts: dict[str, list[dict[int, Encoded]]] = {name: [] for name in stores}
    held: list[int] = []
    with progress("reading samples", len(rows), "samples") as advance:
        for batch in forward.batches(images, in_groups(rows.tolist(), forward.batch_size(len(rows)))):
            report_failures(batch, images, job.skips_undecodable)
            if batch.images is not None:
                tokens, ids = forward(batch.images), [images.ids[row] for row in batch.rows]
                for name, store in stores.items():
                    reduced = {k: reduce_tokens(tokens[k], backbone.layout, store.tokens) for k in layers[name]}
                    parts[name].append(Encoding(reduced, ids, store.dtype, on_device).result())
                held += batch.rows
            advance(len(batch.rows) + len(batch.failed))
    labels = torch.from_numpy(np.asarray(images.labels)[held])
    features = {}
    for name, store in stores.items():
        of_store = {k: rms[k] if store.dtype == "int8" else None for k in layers[name]}
        features[name] = HeldFeatures(
            spec_of_backbone(backbone, layers[name], store.tokens),
            {k: HeldLayer.of([part[k] for part in parts[name]], of_store[k]).to(device) for k in layers[name]},
            labels,
            num_classes=len(job.source.classes),
            multi_label=job.source.multi_label,
            views=job.source.views,
            dtype=store.dtype,
        )
    return features
