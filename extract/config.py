"""The `data:`, `backbone:` and `extract:` sections of pipeline.yaml."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from store.config import PositiveInt
from store.strict_model import StrictModel

Source = Annotated[
    str,
    Field(
        pattern=r"^(digits|drawn:\w+|folder|csv|parquet|tars|torchvision:\w+|video_folder|video_csv)$",
        description="digits, drawn:TASK, folder, csv, parquet, tars, torchvision:NAME, video_folder or video_csv",
    ),
]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
SchedulerAddress = Annotated[
    str | None,
    Field(
        pattern=r"^(tcp|tls|ws|wss|ucx)://.+",
        description="null or the address of a dask scheduler, such as tcp://10.0.0.1:8786",
    ),
]
TimeLimit = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0.0, allow_inf_nan=False)],
    Field(description="auto or a positive number of seconds"),
]


class ClipConfig(StrictModel):
    """The `video:` section: how frames are sampled from a video.

    Every video gives `clips` clips of `frames` frames, spread over its length, and of each clip `crops` squares (1: the
    whole frame; 3: left, middle and right, or top, middle and bottom). All these views are training samples; at
    evaluation their logits are averaged.

    Attributes:
        frames: of a clip.
        stride: distance of two frames, in frames of the mean rate; None spreads them over the whole video. Clips of 16
            frames at stride 4 are the field's "16x4".
        clips: of a video.
        crops: of a frame.
        time_limit: seconds that decoding a video may take.
    """

    frames: PositiveInt = 8
    stride: PositiveInt | None = Field(None, description="null (spread evenly) or a positive whole number of frames")
    clips: PositiveInt = 1
    crops: Literal[1, 3] = 1
    time_limit: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 60.0

    @property
    def views(self) -> int:
        """Number of views of every video."""
        return self.clips * self.crops


class DataConfig(StrictModel):
    """The `data:` section: which samples are used, and how they are split.

    Attributes:
        source: the kind of source.
        root: the path of the data.
        test_split: the source's split to test on; by default `test`, else `val`, `validation` or `valid`.
        test_fraction: share of the samples to test on if the source has a single split; chosen by a hash of their ids.
        val_split: the source's split to validate on, for every seed; None draws validation samples from `train`.
        val_fraction: share of the training split that validation takes if it is drawn.
        on_error: whether a sample that cannot be decoded stops the job or is skipped.
        split_seed: of the hash, or of the images of a drawn source, and of the random crops; another one draws another
            test set and other crops.
        label_column: the column of a CSV or Parquet file with the class.
        video: how videos are sampled; only for video sources.
        views: of every training image that the store keeps: the plain one, and random crops of it.
    """

    source: Source = "digits"
    root: Path | None = Field(None, strict=False, description="a path")
    test_split: str | None = None
    test_fraction: Fraction = 0.25
    val_split: str | None = None
    val_fraction: Fraction = 0.2
    on_error: Literal["fail", "skip"] = "fail"
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    label_column: str = "label"
    video: ClipConfig | None = None
    views: PositiveInt = 1

    @property
    def clips(self) -> ClipConfig | None:
        """How videos are sampled; None for images."""
        return (self.video or ClipConfig()) if self.source.startswith("video_") else None

    @model_validator(mode="after")
    def _require_video_source(self) -> "DataConfig":
        if self.video and not self.clips:
            raise ValueError(f"data.video is given, but data.source is {self.source}; use video_folder or video_csv")
        return self

    @model_validator(mode="after")
    def _refuse_views_of_videos(self) -> "DataConfig":
        if self.views > 1 and self.clips:
            raise ValueError(
                f"data.views is {self.views}, but data.source is {self.source}, and random crops are of images only; "
                "set data.views to 1, and data.video.clips or data.video.crops for several views of every video"
            )
        return self

    @model_validator(mode="after")
    def _refuse_validation_on_test(self) -> "DataConfig":
        if self.val_split is not None and self.val_split == self.test_split:
            raise ValueError(f"data.val_split and data.test_split are both {self.val_split!r}; name two splits")
        return self


class BackboneConfig(StrictModel):
    """The `backbone:` section: a frozen vision transformer of timm, or ViViT.

    Attributes:
        name: of the model; None if the weights give it.
        weights: where they come from.
        image_size: in pixels; None for the model's own.
        model_kwargs: keyword arguments of `timm.create_model`, or for ViViT fields of transformers' `VivitConfig`.
    """

    name: str | None = None
    weights: str = Field(description="pretrained, random, hf-hub:ORG/NAME, or the path of a file or folder")
    image_size: PositiveInt | None = None
    model_kwargs: dict[str, Any] = Field({}, description="keyword arguments of timm.create_model")


class ExtractConfig(StrictModel):
    """The `extract:` section: how the extraction job runs.

    Only `precision` changes the values in the store; on a GPU, `batch_size` may change their last bits.

    Attributes:
        batch_size: images or clips of a forward pass.
        precision: of the forward pass.
        device: such as cpu or cuda.
        workers: processes on this machine; with a `scheduler`, workers to wait for before the start.
        scheduler: address of a dask scheduler.
        shard_seconds: how long a worker may take for a shard before it counts as hung; `auto` is ten times as long as
            the slowest shard so far, and at least ten minutes.
    """

    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="auto or a positive whole number")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    workers: PositiveInt = 1
    scheduler: SchedulerAddress = None
    shard_seconds: TimeLimit = "auto"
