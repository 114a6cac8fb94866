"""The options of the `store:` section of pipeline.yaml."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from store.strict_model import StrictModel

Dtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Compressor = Literal["zstd", "blosc", "gzip"]
MAX_SHARD_SAMPLES = 2**20  # a shard's index, which is read whole, takes 16 bytes a sample
PositiveInt = Annotated[int, Field(ge=1)]
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Every(StrictModel):
    """Every k-th layer, counted back from the last one, which is always stored."""

    every: PositiveInt


class Last(StrictModel):
    """The last n layers."""

    last: PositiveInt


class Spread(StrictModel):
    """At most n layers, evenly spread; the last one is among them."""

    spread: PositiveInt


class Pool(StrictModel):
    """Patch tokens averaged over cells of the grid and, for videos, over `time` frames.

    A cell has `pool` x `pool` patches, or the grid has at most `grid` cells a side. Prefix tokens are kept; if every
    frame has its own, those of `time` frames are averaged too.
    """

    pool: PositiveInt = 1
    grid: PositiveInt | None = None
    time: PositiveInt = 1

    @model_validator(mode="after")
    def _check_sides(self) -> "Pool":
        if self.grid is None and self.pool == self.time == 1:
            raise ValueError("pool or time must be at least 2; `all` keeps every token")
        if self.grid is not None and self.pool > 1:
            raise ValueError("give pool (patches a cell has on a side) or grid (cells a side), not both")
        return self


Layers = Literal["all"] | list[int] | Every | Last | Spread
Tokens = Literal["all", "cls", "mean", "cls_mean"] | Pool
TOKENS_HELP = "all, cls, mean, cls_mean, {pool: k}, {grid: n} or {time: m}, or {time: m} with one of the two"
Preset = Literal["probe", "lean", "coarse", "grid", "full", "auto"]
PRESETS: dict[str, dict[str, Any]] = {
    "probe": {"layers": "all", "tokens": {"grid": 1}, "dtype": "int8"},
    "lean": {"layers": {"spread": 4}, "tokens": {"grid": 2}, "dtype": "int8"},
    "coarse": {"layers": {"spread": 4}, "tokens": {"grid": 8}, "dtype": "int8"},
    "grid": {"layers": {"spread": 4}, "tokens": "all", "dtype": "int8"},
    "full": {"layers": "all", "tokens": "all", "dtype": "float16"},
}


class StoreConfig(StrictModel):
    """Where the tokens are stored, and in which format.

    A preset stands for its layers, tokens and dtype; those that are given beside it take precedence. A split that is
    not stored goes through the backbone when it is read: `test` once, at the end of a job.
    """

    path: str = "cache.zarr"
    preset: Preset | None = Field(None, description="null, probe, lean, coarse, grid, full or auto")
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k}, {spread: n} or {last: n}")
    tokens: Tokens = Field("all", description=TOKENS_HELP)
    dtype: Dtype = "float16"
    compressor: Compressor | None = None
    shard_samples: Annotated[int, Field(ge=1, le=MAX_SHARD_SAMPLES)] = 256
    splits: list[Split] = Field(list(SPLITS), description="[train, test] or [train]")

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, splits: list[Split]) -> list[Split]:
        """Training reads `train` many times, so it is always stored."""
        if splits not in (["train"], ["train", "test"]):
            raise ValueError("train is read in every epoch, so it is always stored; test need not be")
        return splits

    @model_validator(mode="wrap")
    @classmethod
    def _replace_preset(cls, values: Any, validate: ModelWrapValidatorHandler["StoreConfig"]) -> "StoreConfig":
        """Options of a preset in its place, which do not count as given; `auto` stays, until a pilot chooses."""
        options = PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        if options is None:
            return validate(values)
        given = {name: value for name, value in values.items() if name != "preset"}
        config = validate(options | given)
        config.model_fields_set.difference_update(options.keys() - given.keys())
        return config

    def at_preset(self, preset: str) -> "StoreConfig":
        """The options with those of a preset where none were given."""
        given = self.model_dump(include=self.model_fields_set - {"preset"})
        return StoreConfig.model_validate(given | {"preset": preset})
