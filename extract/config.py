"""The `data:`, `backbone:` and `extract:` sections of pipeline.yaml."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from store.config import PositiveInt, Section

Source = Annotated[
    str,
    Field(
        pattern=r"^(digits|folder|csv|parquet|tars|torchvision:\w+)$",
        description="digits, folder, csv, parquet, tars or torchvision:NAME",
    ),
]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class DataConfig(Section):
    """Which samples, and how they are split.

    `test_split` names the split that plays the test set (by default the source's `test`, else its `val`); a source that
    has neither gives `test_fraction` of its samples, chosen by a hash of their ids.
    """

    source: Source = "digits"
    root: Path | None = Field(None, strict=False, description="a path")
    test_split: str | None = None
    test_fraction: Fraction = 0.25
    val_fraction: Fraction = 0.2
    on_error: Literal["fail", "skip"] = "fail"
    views: Literal[1] = Field(1, description="1 (augmented views are not available yet)")


class BackboneConfig(Section):
    """A frozen timm vision transformer. `model_kwargs` go to `timm.create_model`."""

    name: str | None = None
    weights: str = Field(description="pretrained, random, hf-hub:ORG/NAME, or the path of a file or folder")
    image_size: PositiveInt | None = None
    model_kwargs: dict[str, Any] = Field({}, description="keyword arguments of timm.create_model")


class ExtractConfig(Section):
    """How the extraction job runs; nothing here but `precision` changes a value."""

    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="auto or a positive whole number")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    workers: Literal[1] = Field(1, description="1 (several workers are not available yet)")
    scheduler: None = Field(None, description="null (dask schedulers are not available yet)")
