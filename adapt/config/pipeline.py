"""The configuration: all sections of pipeline.yaml as frozen, checked objects."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from adapt.config.search_config import HalvingConfig, SearchConfig
from adapt.config.search_space import LEGAL_SWEEP
from adapt.config.trials import (
    SCHEDULE_KEYS,
    TRIAL_KEYS,
    MethodConfig,
    NonNegative,
    Positive,
    Sweep,
    parse_methods,
)
from adapt.config.variables import ExpandedText, restore_variables
from extract.config import BackboneConfig, DataConfig, ExtractConfig, SchedulerAddress, TimeLimit
from store.config import PositiveInt, StoreConfig
from store.errors import UserError
from store.strict_model import StrictModel

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
_MOST_METHODS = 1_000


class TrainConfig(StrictModel):
    """How methods are trained.

    `epochs`, `batch_size`, `lr` and `weight_decay` are defaults: an entry of `methods:` or a sweep may set others.
    `shuffle_block` is the number of neighboring rows of the store that are shuffled as a block and read at once
    (docs/performance.md). `shots` and `fraction` limit training and validation to a subset of the training samples,
    drawn with each seed: so many of each class, or a share of each class. `refit` trains on validation rows too, once
    the trial is chosen. `keep` says which weights a training gives: those of the epoch that is best on validation, or
    those of the last one. `solve_head` solves the head of a side network anew at the end, at this weight decay, on
    what the network gives it; it affects methods that train from features only. So does `feature_noise`, the deviation
    of the Gaussian noise by which every channel of a sample's tokens is scaled. `mixup` mixes images, or tokens of
    features. `augment` and `grad_checkpointing` affect end-to-end methods only, since cached features are fixed.
    `workers` and `scheduler` are those of `extract:`, for trials. `trial_seconds` is how long a worker may take for a
    trial before it counts as hung; `auto` is ten times as long as the slowest so far, at least a day.
    """

    feature_source: Literal["auto", "resident", "streamed", "online"] = "auto"
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 64
    shuffle_block: PositiveInt = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.01
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    shots: PositiveInt | None = Field(
        None, description="a positive whole number of samples of each class, or null for all"
    )
    fraction: Share | None = Field(None, description="a number above 0 and at most 1, or null for all samples")
    class_weights: Literal["balanced"] | None = Field(None, description="balanced or null")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, strict=False, description="a list of different whole numbers, each at least 0"
    )
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    head_lr: Positive | None = Field(None, description="a positive learning rate, or null for that of the method")
    grad_accumulation: PositiveInt | Literal["auto"] = Field("auto", description="auto or a positive whole number")
    grad_checkpointing: bool = False
    augment: Literal["none", "crop_flip"] = "none"
    mixup: NonNegative = 0.0
    feature_noise: NonNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    keep: Literal["best", "last"] = "best"
    solve_head: Positive | None = Field(None, description="a positive weight decay, or null")
    refit: bool = True
    halving: HalvingConfig | None = Field(None, description="a section such as {factor: 2, min_epochs: 4}, or null")
    tensorboard: bool = False
    workers: PositiveInt = 1
    scheduler: SchedulerAddress = None
    trial_seconds: TimeLimit = "auto"

    @field_validator("tensorboard")
    @classmethod
    def _require_tensorboard(cls, tensorboard: bool) -> bool:
        if tensorboard and find_spec("tensorboard") is None:
            raise UserError(
                "train.tensorboard: true needs TensorBoard; install it with: pip install 'sidecache[tensorboard]'"
            )
        return tensorboard

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds

    @model_validator(mode="after")
    def _check_subset(self) -> "TrainConfig":
        if self.shots is not None and self.fraction is not None:
            raise ValueError("train.shots and train.fraction are both given; keep one of them")
        return self


class ReportNames(StrictModel):
    """The `report_as:` section: names of data set and backbone in results and report; None for their own."""

    dataset: str | None = Field(None, min_length=1, description="null or a name")
    backbone: str | None = Field(None, min_length=1, description="null or a name")


class ReportConfig(StrictModel):
    """The `report:` section: what `report.html` shows."""

    pictures: bool = True


class Config(StrictModel):
    """All sections of pipeline.yaml."""

    name: str = ""
    run_dir: Path = Field(Path("runs/sidecache"), strict=False, description="the path of a folder")
    data: DataConfig = DataConfig()
    backbone: BackboneConfig
    store: StoreConfig = StoreConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    methods: list[str | dict[str, Any]] = Field(
        ["linear_probe", "losa"],
        min_length=1,
        max_length=_MOST_METHODS,
        description="a list of method names or of {name: NAME, option: value}, at most " + f"{_MOST_METHODS:,}",
    )
    sweep: Sweep = Field({}, description=LEGAL_SWEEP)
    search: SearchConfig = SearchConfig()
    report: ReportConfig = ReportConfig()
    report_as: ReportNames = ReportNames()
    _expanded_texts: tuple[ExpandedText, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _check_shots(self) -> "Config":
        if self.train.shots == 1 and self.data.val_split is None:
            raise UserError(
                "train.shots is 1, which leaves no sample of a class to validate on; use at least 2, or data.val_split"
            )
        return self

    @model_validator(mode="after")
    def _check_methods(self) -> "Config":
        self.parsed_methods()
        return self

    def parsed_methods(self) -> tuple[MethodConfig, ...]:
        """The entries of `methods:` with their trials."""
        defaults = {key: getattr(self.train, key) for key in (*SCHEDULE_KEYS, *TRIAL_KEYS)}
        return parse_methods(self.methods, defaults, self.sweep, self.search)

    def as_written(self) -> dict[str, Any]:
        """All values as plain dicts and lists for a file, with `${VARIABLE}` where the user wrote it."""
        return restore_variables(self.model_dump(mode="json"), self._expanded_texts)
