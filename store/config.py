"""The options of the `store:` section of pipeline.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from store.strict_model import StrictModel

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Compressor = Literal["zstd", "blosc", "gzip"]
MAX_SHARD_SAMPLES = 2**20  # a shard's index, which is read whole, takes 16 bytes a sample
PositiveInt = Annotated[int, Field(ge=1)]


class Every(StrictModel):
    """Every k-th layer, counted back from the last one, which is always stored."""

    every: PositiveInt


class Last(StrictModel):
    """The last n layers."""

    last: PositiveInt


class Pool(StrictModel):
    """Patch tokens averaged over `pool` x `pool` squares of the grid and, for videos, over `time` frames.

    Prefix tokens are kept; if every frame has its own, those of `time` frames are averaged too.
    """

    pool: PositiveInt = 1
    time: PositiveInt = 1

    @model_validator(mode="after")
    def _check_sides(self) -> "Pool":
        if self.pool == self.time == 1:
            raise ValueError("pool or time must be at least 2; `all` keeps every token")
        return self


Layers = Literal["all"] | list[int] | Every | Last
Tokens = Literal["all", "cls", "mean", "cls_mean"] | Pool


class StoreConfig(StrictModel):
    """Where the tokens are stored, and in which format."""

    path: str = "cache.zarr"
    layers: Layers = Field("all", description="all, a list such as [3, 7, 11], {every: k} or {last: n}")
    tokens: Tokens = Field("all", description="all, cls, mean, cls_mean, {pool: k}, {time: m} or {pool: k, time: m}")
    dtype: Dtype = "float16"
    compressor: Compressor | None = None
    shard_samples: Annotated[int, Field(ge=1, le=MAX_SHARD_SAMPLES)] = 256
