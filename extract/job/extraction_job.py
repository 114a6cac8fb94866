"""Bundles what an extraction is made from, the samples, the backbone and the settings, in one frozen object.

Every step of the extraction takes the job whole. dask workers get a pickled copy of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from extract.backbones.backbone import Backbone, load_backbone
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from extract.forward.frozen_forward import FrozenForward
from extract.job.workers import Workers
from extract.sources.open_source import ImageSource
from store.config import StoreConfig
from store.layout import resolve_layers


@dataclass(frozen=True, kw_only=True)
class ExtractionJob:
    """The samples, the frozen backbone, and the sections of the configuration.

    Attributes:
        backbone_config: the configuration that `backbone` was loaded from, so that workers can load it too; None for a
            module of the user's, which is pickled instead.
    """

    source: ImageSource
    backbone: Backbone
    data: DataConfig
    store: StoreConfig
    extract: ExtractConfig
    backbone_config: BackboneConfig | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers to store."""
        return resolve_layers(self.store.layers, self.backbone.depth)

    @property
    def skips_undecodable(self) -> bool:
        """Whether samples that cannot be decoded are skipped; otherwise they end the job."""
        return self.data.on_error == "skip"

    @property
    def workers(self) -> Workers:
        """The dask workers that extract the shards, if there are several."""
        return Workers(section="extract", count=self.extract.workers, scheduler=self.extract.scheduler)

    def forward(self, layers: Sequence[int]) -> FrozenForward:
        """The backbone, moved to the job's device, for some layers."""
        return FrozenForward(self.backbone, layers, self.store.tokens, self.extract)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the backbone if workers can load it; see `on_worker`."""
        return self.__dict__ | ({"backbone": None} if self.backbone_config else {})

    def on_worker(self, device: str) -> "ExtractionJob":
        """The unpickled job with its backbone loaded, to run on another device."""
        backbone = load_backbone(self.backbone_config, self.data.clips) if self.backbone_config else self.backbone
        return replace(self, backbone=backbone, extract=self.extract.model_copy(update={"device": device}))
