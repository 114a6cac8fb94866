"""The `data:`, `backbone:` and `extract:` sections of pipeline.yaml."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from store.config import PositiveInt
from store.strict_model import StrictModel

Source = Annotated[
    str,
    Field(
        pattern=r"^(digits|folder|csv|parquet|tars|torchvision:\w+|video_folder|video_csv)$",
        description="digits, folder, csv, parquet, tars, torchvision:NAME, video_folder or video_csv",
    ),
]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class ClipConfig(StrictModel):
    """How frames are drawn from a video.

    `stride: null` spreads `frames` over the whole video; a number sets them that many frames of its mean rate apart
    (clips of 16 frames at stride 4 are the field's "16x4"). Every video gives `clips` such clips, spread over its
    length, of `crops` squares each (1: the whole frame; 3: left, middle and right, or top, middle and bottom). These
    views are samples of training, and their logits are averaged at evaluation.
    """

    frames: PositiveInt = 8
    stride: PositiveInt | None = Field(None, description="null (spread evenly) or a positive whole number of frames")
    clips: PositiveInt = 1
    crops: Literal[1, 3] = 1
    time_limit: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 60.0  # seconds that decoding a video may take

    @property
    def views(self) -> int:
        """Rows that every video gives."""
        return self.clips * self.crops


class DataConfig(StrictModel):
    """Which samples, and how they are split.

    `test_split` names the split that plays the test set (by default the source's `test`, else its `val`, `validation`
    or `valid`); a source of a single split gives `test_fraction` of its samples, chosen by a hash of their ids and of
    `split_seed`.
    `label_column` is the one of a CSV or Parquet list that holds the class. `video` is for video sources alone.
    """

    source: Source = "digits"
    root: Path | None = Field(None, strict=False, description="a path")
    test_split: str | None = None
    test_fraction: Fraction = 0.25
    val_fraction: Fraction = 0.2
    on_error: Literal["fail", "skip"] = "fail"
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    label_column: str = "label"
    video: ClipConfig | None = None
    views: Literal[1] = Field(1, description="1 (augmented views are not available yet)")

    @property
    def clips(self) -> ClipConfig | None:
        """How videos are sampled; None where the samples are images."""
        return (self.video or ClipConfig()) if self.source.startswith("video_") else None

    @model_validator(mode="after")
    def _video_has_a_source(self) -> "DataConfig":
        if self.video and not self.clips:
            raise ValueError(f"data.video is given, but data.source is {self.source}: take video_folder or video_csv")
        return self


class BackboneConfig(StrictModel):
    """A frozen timm vision transformer. `model_kwargs` go to `timm.create_model`."""

    name: str | None = None
    weights: str = Field(description="pretrained, random, hf-hub:ORG/NAME, or the path of a file or folder")
    image_size: PositiveInt | None = None
    model_kwargs: dict[str, Any] = Field({}, description="keyword arguments of timm.create_model")


class ExtractConfig(StrictModel):
    """How the extraction job runs; nothing here but `precision` changes a value (on a GPU `batch_size` its last bits).

    `workers` is the number of processes on this machine; with a `scheduler`, of workers to wait for before the start.
    `shard_seconds` is how long one of them may take for a shard before it counts as hung; `auto` is ten times as long
    as the slowest so far, and at least ten minutes.
    """

    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="auto or a positive whole number")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    workers: PositiveInt = 1
    scheduler: str | None = Field(
        None,
        pattern=r"^(tcp|tls|ws|wss|ucx)://.+",
        description="null or the address of a dask scheduler, such as tcp://10.0.0.1:8786",
    )
    shard_seconds: Literal["auto"] | Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        "auto", description="auto or a positive number of seconds"
    )
