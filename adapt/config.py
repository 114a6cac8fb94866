"""pipeline.yaml, parsed once into frozen, checked objects."""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from adapt.methods import METHODS, find_method
from extract.config import BackboneConfig, DataConfig, ExtractConfig
from store.config import PositiveInt, Section, StoreConfig
from store.errors import UserError

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_TRIAL_KEYS = ("lr", "weight_decay")


class TrainConfig(Section):
    """How every method is trained. `lr` and `weight_decay` serve where neither method nor sweep gives them."""

    feature_source: Literal["auto", "resident", "streamed", "online"] = "auto"
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.01
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    class_weights: Literal["balanced"] | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] = (0, 1, 2)
    device: str = "auto"


class Trial(Section):
    """One point of a method's grid."""

    options: Section
    lr: float
    weight_decay: float


class MethodConfig(Section):
    """One entry of `methods:`, with the points among which validation chooses."""

    name: str
    epochs: PositiveInt
    trials: tuple[Trial, ...]


class Config(Section):
    """The whole of pipeline.yaml."""

    name: str = "sidecache"
    run_dir: Annotated[Path, Field(strict=False)] = Path("runs/sidecache")
    data: DataConfig = DataConfig()
    backbone: BackboneConfig
    store: StoreConfig = StoreConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    methods: list[str | dict[str, Any]] = Field(
        ["linear_probe", "losa"], min_length=1, description="a list of method names or of {name: NAME, option: value}"
    )
    sweep: dict[str, list[Any]] = Field({}, description="{option: [values]}, every combination of which is tried")

    @model_validator(mode="after")
    def _check_methods(self) -> "Config":
        self.parsed_methods()
        return self

    def parsed_methods(self) -> tuple[MethodConfig, ...]:
        """The methods with their grids."""
        return tuple(_parse_method(entry, self.train, self.sweep) for entry in self.methods)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read pipeline.yaml, or a dict of the same shape.

    Args:
        source: path of a YAML file (relative paths in it are relative to its folder), or a mapping.
        overrides: `section.key=value` strings; values are YAML.

    Raises:
        UserError: not YAML, an unknown key, a value that is not legal; the message names the key and what is legal.
    """
    if isinstance(source, Mapping):
        document, folder = dict(source), Path.cwd()
    else:
        document, folder = _read_yaml(Path(source)), Path(source).expanduser().absolute().parent
    for override in overrides:
        document = _override(document, override)
    try:
        config = Config.model_validate(_expand(document))
    except ValidationError as error:
        raise UserError(explain(error, Config)) from error
    return _resolve_paths(config, folder)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every mistake on a line of its own: the key, what was given, what is legal."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors():
        by_key.setdefault(_key(detail["loc"], model), []).append(detail)
    return "\n".join(_explain_key(key, details, model) for key, details in by_key.items())


def _key(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The dotted key as the user writes it: where pydantic enters a union it adds names of its own, which are cut."""
    key: list[str] = []
    current: Any = model
    for part in loc:
        key.append(str(part))
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field else None
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            break
    return ".".join(key)


def _explain_key(key: str, details: Sequence[Any], model: type[BaseModel]) -> str:
    first = details[0]
    *path, last = key.split(".")
    section: Any = model
    for part in path:
        section = section.model_fields[part].annotation
    if first["type"] == "extra_forbidden" and last not in section.model_fields:
        return f"{key}: unknown key; legal keys here: {', '.join(section.model_fields)}"
    if not key:
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key}: is missing"
    description = section.model_fields[last].description if last in section.model_fields else None
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = first["input"]
    return f"{key}: given {given!r}; " + (f"legal: {description}" if description else reason[0].lower() + reason[1:])


def _parse_method(entry: str | dict[str, Any], train: TrainConfig, sweep: Mapping[str, list[Any]]) -> MethodConfig:
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name: Any = given.pop("name", None)
    epochs: Any = given.pop("epochs", train.epochs)
    if not isinstance(name, str):
        raise UserError(f"methods: {entry!r} has no name; write it as {{name: losa, rank: 8}}")
    own: Any = given.pop("sweep", {})
    if not isinstance(own, dict) or not all(isinstance(values, list) and values for values in own.values()):
        raise UserError(f"methods: the sweep of {name} must be {{option: [values]}}, got {own!r}")
    known = find_method(name).options.model_fields
    # A sweep for all methods reaches those that know the option; what an entry fixes or sweeps itself has precedence.
    shared = {k: v for k, v in sweep.items() if (k in known or k in _TRIAL_KEYS) and k not in given}
    if unknown := [k for k in sweep if k not in _TRIAL_KEYS and not _known_somewhere(k)]:
        raise UserError(f"sweep: no method has an option {unknown[0]!r}")
    grid = shared | own
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    try:
        return MethodConfig(
            name=name, epochs=epochs, trials=tuple(_trial(name, given | point, train) for point in points)
        )
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, MethodConfig)}") from error


def _known_somewhere(option: str) -> bool:
    return any(option in method.options.model_fields for method in METHODS.values())


def _trial(name: str, given: Mapping[str, Any], train: TrainConfig) -> Trial:
    kind = find_method(name).options
    options = {key: value for key, value in given.items() if key not in _TRIAL_KEYS}
    rates = {key: given.get(key, getattr(train, key)) for key in _TRIAL_KEYS}
    for key, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (key == "lr" and value == 0):
            raise UserError(f"methods: {name}: {key}: given {value!r}; legal: a number above 0")
    try:
        return Trial(options=kind.model_validate(options), **rates)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, kind)}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if not isinstance(key, str):
            raise yaml.YAMLError(f"the key {key!r} is no text{node.start_mark}")
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    document = _parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold sections such as `data:` and `backbone:`, not {type(document).__name__}")
    return document


def _override(document: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"-o {override}: write it as -o section.key=value, for example -o train.epochs=5")
    value = _parse_yaml(text, f"-o {override}")
    for part in reversed(path[1:]):
        value = {part: value}
    merged: dict[str, Any] = _merge(document, {path[0]: value})
    return merged


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def _expand(value: Any) -> Any:
    """Replace ${VARIABLE} in every text."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{value!r}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", substitute, value)


def _resolve_paths(config: Config, folder: Path) -> Config:
    def resolve(path: str | Path) -> Path:
        return folder / Path(path).expanduser()

    data, backbone, store = config.data, config.backbone, config.store
    if data.root is not None:
        data = data.model_copy(update={"root": resolve(data.root)})
    if backbone.weights not in ("pretrained", "random") and not backbone.weights.startswith("hf-hub:"):
        backbone = backbone.model_copy(update={"weights": str(resolve(backbone.weights))})
    if "://" not in store.path:
        store = store.model_copy(update={"path": str(resolve(store.path))})
    return config.model_copy(
        update={"run_dir": resolve(config.run_dir), "data": data, "backbone": backbone, "store": store}
    )
