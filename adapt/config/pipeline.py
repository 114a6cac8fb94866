"""pipeline.yaml, parsed once into frozen, checked objects."""

import itertools
import math
import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from adapt.config.messages import explain, show
from adapt.config.variables import Keys, Text, as_written, expand, texts_with_variables
from adapt.config.yaml_text import read_document
from adapt.methods.options import MethodOptions
from adapt.methods.registry import METHODS, find_method
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from store.config import PositiveInt, StoreConfig
from store.errors import UserError
from store.strict_model import StrictModel

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
_MOST_METHODS, _MOST_TRIALS = 1_000, 10_000  # a slip of the pen such as a sweep over six options stops here
_TRIAL_KEYS = ("lr", "weight_decay")
_PACE_KEYS = ("epochs", "batch_size")
# of an entry of `methods:`, beside the options of the method itself
_ENTRY_KEYS = ("name", *_PACE_KEYS, *_TRIAL_KEYS, "sweep")


class TrainConfig(StrictModel):
    """How every method is trained. `lr` and `weight_decay` serve where neither method nor sweep gives them.

    `shuffle_block` is how many neighbors in the store are drawn together, to be read at once (docs/performance.md).
    `augment`, `mixup` and `grad_checkpointing` reach end-to-end methods only: a cache holds what it holds.
    """

    feature_source: Literal["auto", "resident", "streamed", "online"] = "auto"
    epochs: PositiveInt = 30
    search_epochs: PositiveInt | None = Field(
        None, description="epochs of a trial of a search, or null for all of them"
    )
    batch_size: PositiveInt = 64
    shuffle_block: PositiveInt = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.01
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    class_weights: Literal["balanced"] | None = Field(None, description="balanced or null")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, strict=False, description="a list of whole numbers from 0 on, each of them once"
    )
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    head_lr: Positive | None = Field(None, description="the learning rate of the head, or null for that of the method")
    grad_accumulation: PositiveInt | Literal["auto"] = Field("auto", description="auto or a positive whole number")
    grad_checkpointing: bool = False
    augment: Literal["none", "crop_flip"] = "none"
    mixup: NonNegative = 0.0

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


class Trial(StrictModel):
    """One point of a method's grid; `lr` is None where the method is solved and not trained step by step."""

    options: MethodOptions
    lr: Positive | None
    weight_decay: NonNegative


class MethodConfig(StrictModel):
    """One entry of `methods:`, with the points among which validation chooses."""

    name: str
    epochs: PositiveInt
    batch_size: PositiveInt
    trials: tuple[Trial, ...]

    @property
    def different_options(self) -> list[MethodOptions]:
        """Those of the trials, each once: rates and weight decays build no other model."""
        return list({trial.options.model_dump_json(): trial.options for trial in self.trials}.values())


class Config(StrictModel):
    """The whole of pipeline.yaml."""

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
        {}, description="{option: [values]}, every combination of which is tried"
    )
    _texts: tuple[Text, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _check_methods(self) -> "Config":
        methods = self.parsed_methods()
        if (n_trials := sum(len(method.trials) for method in methods)) > _MOST_TRIALS:
            raise UserError(f"methods: there are {n_trials:,} trials in all; legal: at most {_MOST_TRIALS:,}")
        for position, method in enumerate(methods):
            if method in methods[:position]:
                raise UserError(f"methods: {method.name} is there twice with the same options; remove or change one")
        known = {option for method in methods for option in _swept(method.name)}
        if unknown := [option for option in self.sweep if option not in known]:
            legal = ", ".join(sorted(known))
            raise UserError(f"sweep: no method of `methods:` has an option {unknown[0]!r}; legal: {legal}")
        return self

    def parsed_methods(self) -> tuple[MethodConfig, ...]:
        """The methods with their grids."""
        return tuple(_parse_method(entry, self.train, self.sweep) for entry in self.methods)

    def as_written(self) -> dict[str, Any]:
        """All values as plain dicts and lists, with `${VARIABLE}` where the user wrote it: fit to be kept in a file."""
        return as_written(self.model_dump(mode="json"), self._texts)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read pipeline.yaml, or a dict of the same shape.

    Args:
        source: path of a YAML file (relative paths in it are relative to its folder), or a mapping.
        overrides: `section.key=value` strings; a value is text as it stands where the key holds text, otherwise YAML.

    Raises:
        UserError: not YAML, an unknown key, a value that is not legal; the message names the key and what is legal.
    """
    document = read_document(source, overrides, Config)
    folder = Path.cwd() if isinstance(source, Mapping) else Path(source).expanduser().absolute().parent
    try:
        config = Config.model_validate(expand(document))
    except ValidationError as error:
        raise UserError(explain(error, Config)) from error
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply, or holds itself") from error
    resolved = _resolve_paths(config, folder)
    resolved._texts = tuple(_resolve_text(text, resolved, folder) for text in texts_with_variables(document))
    return resolved


def _parse_method(entry: str | dict[str, Any], train: TrainConfig, sweep: Mapping[str, list[Any]]) -> MethodConfig:
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name: Any = given.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"methods: {show(entry)} has no name; write it as {{name: losa, rank: 8}}")
    if name not in METHODS:
        raise UserError(f"methods: there is no method {name!r}; legal: {', '.join(METHODS)}")
    own: Any = given.pop("sweep", {})
    grid = _grid(name, given, own, sweep)
    _refuse_pace(name, {*given, *grid})
    pace: dict[str, Any] = {key: given.pop(key, getattr(train, key)) for key in _PACE_KEYS}
    if (n_points := math.prod(map(len, grid.values()))) > _MOST_TRIALS:
        raise UserError(f"methods: {name}: its sweep has {n_points:,} combinations; legal: at most {_MOST_TRIALS:,}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    trials = tuple(_trial(name, given | point, train) for point in points)
    try:
        return MethodConfig(name=name, trials=trials, **pace)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, MethodConfig)}") from error


def _grid(name: str, fixed: Mapping[str, Any], own: Any, sweep: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """A sweep for all methods reaches those that know the option; what an entry fixes or sweeps has precedence."""
    if not isinstance(own, dict) or not all(isinstance(values, list) and values for values in own.values()):
        raise UserError(f"methods: {name}: sweep: given {show(own)}; legal: {{option: [values]}}")
    if twice := [option for option in own if option in fixed]:
        raise UserError(f"methods: {name}: {twice[0]} is both fixed and swept; keep one of the two")
    if of_entry := [option for option in own if option in ("name", "sweep", *_PACE_KEYS)]:
        legal = ", ".join(sorted(_swept(name)))
        raise UserError(f"methods: {name}: sweep: {of_entry[0]} cannot be swept; legal: {legal}")
    known = _swept(name)
    return {option: values for option, values in sweep.items() if option in known and option not in fixed} | own


def _swept(name: str) -> set[str]:
    """What a sweep can vary of a method."""
    method = find_method(name)
    return {*_TRIAL_KEYS[method.solved :], *method.options.model_fields}


def _refuse_pace(name: str, given: set[str]) -> None:
    if find_method(name).solved and (useless := sorted(given & {"lr", *_PACE_KEYS})):
        raise UserError(
            f"methods: {name}: {', '.join(useless)} given; it is solved to its optimum, not trained step by step: "
            "of these only weight_decay has a meaning"
        )


def _trial(name: str, given: Mapping[str, Any], train: TrainConfig) -> Trial:
    kind = find_method(name).options
    options = {key: value for key, value in given.items() if key not in _TRIAL_KEYS}
    rates = {key: given.get(key, getattr(train, key)) for key in _TRIAL_KEYS}
    if find_method(name).solved:
        rates["lr"] = None
    model: type[StrictModel] = kind
    try:
        checked = kind.model_validate(options)
        model = Trial
        return Trial(options=checked, **rates)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, model, _ENTRY_KEYS)}") from error


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Relative paths start at the folder of the YAML file; URLs and the names of weights stay as they are."""
    data, backbone, store = config.data, config.backbone, config.store
    if data.root is not None:
        data = data.model_copy(update={"root": _resolve("data.root", data.root, folder)})
    if backbone.weights not in ("pretrained", "random") and not backbone.weights.startswith("hf-hub:"):
        weights = _resolve("backbone.weights", backbone.weights, folder)
        backbone = backbone.model_copy(update={"weights": str(weights)})
    if "://" not in store.path:
        store = store.model_copy(update={"path": str(_resolve("store.path", store.path, folder))})
    run_dir = _resolve("run_dir", config.run_dir, folder)
    return config.model_copy(update={"run_dir": run_dir, "data": data, "backbone": backbone, "store": store})


def _resolve_text(text: Text, config: Config, folder: Path) -> Text:
    """A path with variables, as it has to be written for any folder; other texts stay as they are."""
    values: dict[Keys, Any] = {
        ("run_dir",): config.run_dir,
        ("data", "root"): config.data.root,
        ("backbone", "weights"): config.backbone.weights,
        ("store", "path"): config.store.path,
    }
    value = str(values.get(text.keys, text.value))
    if value == text.value:
        return text
    is_absolute = Path(text.value).expanduser().is_absolute()
    return Text(text.keys, text.written if is_absolute else str(folder / text.written), value)


def _resolve(key: str, path: str | Path, folder: Path) -> Path:
    try:
        resolved = Path(os.path.normpath(folder / Path(path).expanduser()))
    except RuntimeError as error:
        raise UserError(f"{key}: given {show(str(path))}; there is no home folder of that user") from error
    if not str(path) or "\0" in str(path):
        raise UserError(f"{key}: given {show(str(path))}; legal: a path")
    return resolved
