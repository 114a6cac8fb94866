"""Collects the facts of a job that are known before it runs: samples, shapes, stored shards, free disk space."""

from functools import cached_property

import torch

from adapt.config.pipeline import Config
from adapt.config.trials import MethodConfig
from adapt.features.specs import spec_of_backbone
from adapt.job.checks import draw_source_rows, require_match, require_weights
from adapt.job.feature_set import needed_layers
from adapt.job.intrinsic_dimension import entry_of
from adapt.methods.feature_spec import FeatureSpec
from adapt.methods.registry import build_model, find_method
from adapt.planning.preset_choice import at_preset, known_pilot
from adapt.training.batch_order import Rows
from adapt.training.row_draw import RowDraw, draw_rows
from extract.backbones.backbone_shape import backbone_shape
from extract.job.store_schema import DatasetInfo, schema_for
from extract.sources.augmented_views import with_views
from extract.sources.open_source import ImageSource, open_source
from store.address import free_disk_bytes, store_url
from store.arrays import open_schema
from store.config import SPLITS, StoreConfig
from store.errors import JobError, UserError
from store.kvstore import KeyValueStore
from store.layout import resolve_layers
from store.reader import Store, open_store
from store.schema import Schema

_DEFAULT_CLASSES = 100  # if the samples are missing


class JobFacts:
    """The facts of a configuration. `notes` lists what is missing, and what would stop the job."""

    def __init__(self, config: Config) -> None:
        self.notes: list[str] = []
        self.config = config = self._with_preset(config)
        self.shape = backbone_shape(config.backbone, config.data.clips)  # the backbone on the meta device
        self.source = self._open_source()
        self.store = self._open_store()
        self._note_weights()
        self.schema = self.schema_of(config.store)
        self.spec = self.spec_of(config.store)

    @cached_property
    def rows(self) -> dict[str, int] | None:
        """Rows of the store (samples, or views of samples) by split; None if neither samples nor a store exist."""
        if self.source:
            return {name: len(split) for name, split in self.source.without(self._unstored).splits.items()}
        return {name: info.num_samples for name, info in self.store.schema.splits.items()} if self.store else None

    @cached_property
    def unstored_rows(self) -> dict[str, int] | None:
        """Rows of the splits that are not stored; None if they are unknown."""
        return {name: len(self.source.splits[name]) for name in self._unstored} if self.source else None

    @property
    def _unstored(self) -> list[str]:
        """Splits that are not in `store.splits`, and that the store does not have already."""
        stored = {*self.config.store.splits, *(self.store.splits if self.store else ())}
        return [split for split in SPLITS if split not in stored]

    @property
    def training_rows(self) -> int:
        """Rows of the training samples in all their views, augmented ones too; 0 if they are unknown."""
        return self.rows["train"] * (1 + self.schema.augmented_views) if self.rows else 0

    @cached_property
    def trained_rows(self) -> int | None:
        """Rows of an epoch of the final training; None if they are unknown, or the draw is refused."""
        drawn = self.drawn_rows(for_search=False)
        return drawn[0] if drawn else None

    def drawn_rows(self, for_search: bool) -> tuple[int, int] | None:
        """Rows that a trial is trained on and validated on; None if they are unknown, or the draw is refused."""
        draw = RowDraw.of(self.config, for_search)
        try:
            drawn = self._draw(draw)
        except UserError as error:
            self.notes += [str(error)] if str(error) not in self.notes else []
            return None
        if drawn is None:
            return None
        rows, val_rows = drawn
        return (len(rows) + len(val_rows), 0) if draw.refit else (len(rows), len(val_rows))

    def _draw(self, draw: RowDraw) -> tuple[Rows, Rows] | None:
        """The drawn rows, of the source or else of the store; None if there is neither."""
        seed = self.config.train.seeds[0]
        if self.source:
            return draw_source_rows(self.source, draw, seed)
        if self.store is None:
            return None
        labels, own = torch.from_numpy(self.store.labels("train")), self.store.validation_rows()
        return draw_rows(labels, draw, seed=seed, views=self.store.schema.views, validation_rows=own)

    @cached_property
    def rows_to_extract(self) -> int | None:
        """Rows of the shards that are not committed, and of those that new samples complete or begin."""
        if self.store is None or self.rows is None:
            return None if self.rows is None else sum(self.rows.values())
        return sum(self._rows_to_extract(self.store, split, rows) for split, rows in self.rows.items())

    @staticmethod
    def _rows_to_extract(store: Store, split: str, rows: int) -> int:
        if split not in store.splits:
            return rows
        shards, missing = store.schema.shards(split), store.missing_shards(split)
        final = shards.num_samples  # rows of shards that stay as they are
        if rows > final:
            final -= final % shards.shard_samples  # the last shard is written again, with the new samples
        not_committed = sum(len(shards.rows(shard)) for shard in missing if shards.rows(shard).start < final)
        return max(0, rows - final) + not_committed

    @cached_property
    def free_bytes(self) -> int | None:
        """Free bytes on the disk of the store; None if the store is not local."""
        return free_disk_bytes(store_url(self.config.store.path))

    @cached_property
    def stepwise(self) -> MethodConfig:
        """The method whose training steps on features are timed: LoSA, else the first such method of the job."""
        names = [method.name for method in self.config.parsed_methods()]
        stepwise = [n for n in names if not find_method(n).trains_backbone and not find_method(n).solved]
        return entry_of(self.config, stepwise[0] if stepwise and "losa" not in stepwise else "losa")

    @cached_property
    def end_to_end(self) -> MethodConfig | None:
        """The first method of the job that trains through the backbone, except those with `targets: auto`."""
        methods = (m for m in self.config.parsed_methods() if find_method(m.name).trains_backbone)
        return next((m for m in methods if not m.trials[0].options.needs_measurement), None)

    @cached_property
    def layers_read(self) -> tuple[int, ...]:
        """The layers that the methods of the job read."""
        return needed_layers(self.config, self.spec, len(self.schema.classes))

    def schema_of(self, store: StoreConfig) -> Schema:
        """The schema of such a store, without digests."""
        source, clips = self.source, self.config.data.clips
        unknown = {"weights_digest": "", "preprocessing_digest": "", "precision": "", "samples": {}}
        dataset = DatasetInfo(
            name=source.name if source else "",
            classes=source.classes if source else tuple(map(str, range(_DEFAULT_CLASSES))),
            multi_label=bool(source and source.multi_label),
            views=clips.views if clips else 1,
            rows=self.rows or {},
            val_split=source.val_split if source else "",
        )
        return schema_for(self.shape, store, dataset, unknown)

    def spec_of(self, store: StoreConfig) -> FeatureSpec:
        """The features of such a store."""
        return spec_of_backbone(self.shape, resolve_layers(store.layers, self.shape.depth), store.tokens)

    def can_train_from(self, store: StoreConfig) -> bool:
        """Whether all methods of the job can train from such a store."""
        spec = self.spec_of(store)
        try:
            for method in self.config.parsed_methods():
                if not find_method(method.name).trains_backbone:
                    with torch.device("meta"):
                        build_model(method.name, spec, len(self.schema.classes), method.trials[0].options)
                elif store.tokens != "all":
                    return False  # the read-out of an end-to-end method is standardized by all tokens
        except UserError:
            return False
        return True

    def _with_preset(self, config: Config) -> Config:
        """The configuration with the preset that a pilot has chosen in place of `auto`, or else `full`."""
        if config.store.preset != "auto":
            return config
        try:
            pilot = known_pilot(config)
        except JobError as error:
            self.notes.append(str(error))
            pilot = None
        if pilot is None:
            self.notes.append(
                "store.preset is auto, and no pilot has chosen yet: this is the plan of `full`; "
                "`sidecache plan --pilot` chooses"
            )
        return at_preset(config, pilot.chosen if pilot else "full")

    def _open_source(self) -> ImageSource | None:
        try:
            return with_views(open_source(self.config.data), self.config.data)
        except (UserError, JobError) as error:
            self.notes.append(
                f"the samples cannot be listed, so their number and the time to decode them are unknown: {error}"
            )
            return None

    def _open_store(self) -> Store | None:
        """The store that the job would continue; None if there is none, or it was made from something else."""
        kvstore = KeyValueStore(store_url(self.config.store.path))
        try:
            if open_schema(kvstore) is None:
                return None
            store = open_store(self.config.store.path)
            require_match(store, self.config)
        except (UserError, JobError) as error:
            self.notes.append(str(error))
            return None
        return store

    def _note_weights(self) -> None:
        try:
            require_weights(self.config.backbone)
        except UserError as error:
            self.notes.append(str(error))
