"""The configuration: all sections of pipeline.yaml as frozen, checked objects, and the trials of its methods."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from adapt.config.messages import explain, show
from adapt.config.variables import ExpandedText, restore_variables
from adapt.methods.options import MethodOptions
from adapt.methods.registry import METHODS, find_method
from extract.config import BackboneConfig, DataConfig, ExtractConfig, SchedulerAddress, TimeLimit
from store.config import PositiveInt, StoreConfig
from store.errors import UserError
from store.strict_model import StrictModel

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
_MOST_METHODS, _MOST_TRIALS = 1_000, 10_000  # stops a mistake such as a sweep over six options

# keys of an entry of `methods:` beside the options of the method
_TRIAL_KEYS = ("lr", "weight_decay")  # a sweep may vary these
_SCHEDULE_KEYS = ("epochs", "batch_size")
_ENTRY_KEYS = ("name", *_SCHEDULE_KEYS, *_TRIAL_KEYS, "sweep")


class TrainConfig(StrictModel):
    """How methods are trained.

    `epochs`, `batch_size`, `lr` and `weight_decay` are defaults: an entry of `methods:` or a sweep may set others.
    `shuffle_block` is the number of neighboring rows of the store that are shuffled as a block and read at once
    (docs/performance.md). `augment`, `mixup` and `grad_checkpointing` affect end-to-end methods only, since cached
    features are fixed. `workers` and `scheduler` are those of `extract:`, for trials. `trial_seconds` is how long a
    worker may take for a trial before it counts as hung; `auto` is ten times as long as the slowest so far, at least a
    day.
    """

    feature_source: Literal["auto", "resident", "streamed", "online"] = "auto"
    epochs: PositiveInt = 30
    search_epochs: PositiveInt | None = Field(
        None, description="a positive whole number of epochs, or null for as many as in training"
    )
    batch_size: PositiveInt = 64
    shuffle_block: PositiveInt = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.01
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
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
    workers: PositiveInt = 1
    scheduler: SchedulerAddress = None
    trial_seconds: TimeLimit = "auto"

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


class Trial(StrictModel):
    """One point of a method's grid; `lr` is None for a method that is solved instead of trained step by step."""

    options: MethodOptions
    lr: Positive | None
    weight_decay: NonNegative


class MethodConfig(StrictModel):
    """One entry of `methods:`, with the trials among which validation chooses."""

    name: str
    epochs: PositiveInt
    batch_size: PositiveInt
    trials: tuple[Trial, ...]

    @property
    def different_options(self) -> list[MethodOptions]:
        """The distinct options of the trials: learning rate and weight decay do not change the model."""
        return list({trial.options.model_dump_json(): trial.options for trial in self.trials}.values())


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
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="{option: [values]}; every combination is tried"
    )
    _expanded_texts: tuple[ExpandedText, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _check_methods(self) -> "Config":
        methods = self.parsed_methods()
        if (n_trials := sum(len(method.trials) for method in methods)) > _MOST_TRIALS:
            raise UserError(f"methods: there are {n_trials:,} trials in all; legal: at most {_MOST_TRIALS:,}")
        for position, method in enumerate(methods):
            if method in methods[:position]:
                raise UserError(f"methods: {method.name} appears twice with the same options; remove or change one")
        legal_options = {option for method in methods for option in _sweepable(method.name)}
        if unknown := [option for option in self.sweep if option not in legal_options]:
            legal = ", ".join(sorted(legal_options))
            raise UserError(f"sweep: no method of `methods:` has an option {unknown[0]!r}; legal: {legal}")
        return self

    def parsed_methods(self) -> tuple[MethodConfig, ...]:
        """The entries of `methods:` with their trials."""
        return tuple(_parse_method(entry, self.train, self.sweep) for entry in self.methods)

    def as_written(self) -> dict[str, Any]:
        """All values as plain dicts and lists for a file, with `${VARIABLE}` where the user wrote it."""
        return restore_variables(self.model_dump(mode="json"), self._expanded_texts)


def _parse_method(entry: str | dict[str, Any], train: TrainConfig, sweep: Mapping[str, list[Any]]) -> MethodConfig:
    fixed = {"name": entry} if isinstance(entry, str) else dict(entry)
    name: Any = fixed.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"methods: {show(entry)} has no name; write it as {{name: losa, rank: 8}}")
    if name not in METHODS:
        raise UserError(f"methods: there is no method {name!r}; legal: {', '.join(METHODS)}")
    entry_sweep: Any = fixed.pop("sweep", {})
    grid = _grid(name, fixed, sweep, entry_sweep)
    _refuse_schedule_of_solved(name, {*fixed, *grid})
    schedule: dict[str, Any] = {key: fixed.pop(key, getattr(train, key)) for key in _SCHEDULE_KEYS}
    if (n_points := math.prod(map(len, grid.values()))) > _MOST_TRIALS:
        raise UserError(f"methods: {name}: its sweep has {n_points:,} combinations; legal: at most {_MOST_TRIALS:,}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    trials = tuple(_trial(name, fixed | point, train) for point in points)
    try:
        return MethodConfig(name=name, trials=trials, **schedule)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, MethodConfig)}") from error


def _grid(
    name: str, fixed: Mapping[str, Any], sweep: Mapping[str, list[Any]], entry_sweep: Any
) -> dict[str, list[Any]]:
    """The values of each swept option of a method.

    Args:
        fixed: what the entry sets; this is not swept.
        sweep: the section `sweep:`, of which a method takes the options that it has.
        entry_sweep: the entry's own `sweep:`, which has precedence.
    """
    if not isinstance(entry_sweep, dict) or not all(isinstance(v, list) and v for v in entry_sweep.values()):
        raise UserError(f"methods: {name}: sweep: given {show(entry_sweep)}; legal: {{option: [values]}}")
    if twice := [option for option in entry_sweep if option in fixed]:
        raise UserError(f"methods: {name}: {twice[0]} is both fixed and swept; keep one of the two")
    sweepable = _sweepable(name)
    if not_swept := [option for option in entry_sweep if option in ("name", "sweep", *_SCHEDULE_KEYS)]:
        legal = ", ".join(sorted(sweepable))
        raise UserError(f"methods: {name}: sweep: {not_swept[0]} cannot be swept; legal: {legal}")
    shared = {option: values for option, values in sweep.items() if option in sweepable and option not in fixed}
    return shared | entry_sweep


def _sweepable(name: str) -> set[str]:
    """The keys of a method that a sweep can vary."""
    method = find_method(name)
    keys = {"weight_decay", *method.options.model_fields}
    return keys if method.solved else keys | {"lr"}


def _refuse_schedule_of_solved(name: str, keys: set[str]) -> None:
    if find_method(name).solved and (useless := sorted(keys & {"lr", *_SCHEDULE_KEYS})):
        raise UserError(
            f"methods: {name}: {', '.join(useless)} given; it is solved to its optimum, not trained step by step: "
            "of these only weight_decay has a meaning"
        )


def _trial(name: str, values: Mapping[str, Any], train: TrainConfig) -> Trial:
    method = find_method(name)
    trial_values = {key: values.get(key, getattr(train, key)) for key in _TRIAL_KEYS}
    if method.solved:
        trial_values["lr"] = None
    model: type[StrictModel] = method.options
    try:
        options = method.options.model_validate({k: v for k, v in values.items() if k not in _TRIAL_KEYS})
        model = Trial
        return Trial(options=options, **trial_values)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, model, _ENTRY_KEYS)}") from error
