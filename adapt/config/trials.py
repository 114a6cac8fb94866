"""The entries of `methods:` as checked objects, each with the trials among which validation chooses."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from adapt.config.messages import explain, show
from adapt.config.search_config import MOST_TRIALS, SearchConfig
from adapt.config.search_space import LEGAL_SWEEP, Choice, Coordinate, Range, SweptValues, as_axis
from adapt.methods.options import MethodOptions
from adapt.methods.registry import find_method
from store.config import PositiveInt
from store.errors import UserError
from store.strict_model import StrictModel

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_MOST_CORNERS = 1_000  # every one is built once before the work starts
_MOST_DRAWS = 100  # for each point that is wanted; a range may be so narrow that it holds fewer numbers

# keys of an entry of `methods:` beside the options of the method
TRIAL_KEYS = ("lr", "weight_decay")  # a sweep may vary these
SCHEDULE_KEYS = ("epochs", "batch_size", "head_lr")
_ENTRY_KEYS = ("name", *SCHEDULE_KEYS, *TRIAL_KEYS, "sweep")

Sweep = dict[str, SweptValues]


class Trial(StrictModel):
    """One point of a method's search; `lr` is None for a method that is not trained step by step."""

    options: MethodOptions
    lr: Positive | None
    weight_decay: NonNegative

    @property
    def key(self) -> str:
        """Text that is equal for equal trials only."""
        return self.key_of(**self.model_dump(mode="json", serialize_as_any=True))

    @staticmethod
    def key_of(options: Mapping[str, Any], lr: float | None, weight_decay: float) -> str:
        """The key of a trial, from its values as JSON gives them."""
        return json.dumps([options, lr, weight_decay], sort_keys=True)


class Space(StrictModel):
    """The points of a method's sweep.

    Args:
        method: name of the method.
        fixed: values that are not swept, by key; learning rate and weight decay included.
        axes: the swept keys.
    """

    method: str
    fixed: dict[str, Any]
    axes: dict[str, Range]

    def trial(self, coordinates: Mapping[str, Coordinate]) -> Trial:
        """The trial at a point.

        Raises:
            UserError: a value is illegal.
        """
        return parse_trial(self.method, self.fixed | {key: self.axes[key].value(c) for key, c in coordinates.items()})

    def draw(self, n_points: int, seed: int) -> list[dict[str, Coordinate]]:
        """Different points at random; all of them if the space has fewer.

        The points depend on the seed, the method's name and the axes only.
        """
        rng = np.random.default_rng([seed, *self.method.encode()])
        found: dict[tuple[Coordinate, ...], dict[str, Coordinate]] = {}
        n_different = min(n_points, math.prod(axis.size for axis in self.axes.values()))
        for _ in range(_MOST_DRAWS * n_points):
            point = {key: axis.draw(rng) for key, axis in self.axes.items()}
            found.setdefault(tuple(point.values()), point)
            if len(found) == n_different:
                break
        return list(found.values())

    def ends(self) -> list[Trial]:
        """Trials that hold each end of each axis, with the other axes at their first end.

        Raises:
            UserError: a value is illegal.
        """
        first = {key: axis.ends[0] for key, axis in self.axes.items()}
        return [self.trial(first | {key: end}) for key, axis in self.axes.items() for end in axis.ends]

    def corners(self) -> list[Trial]:
        """Trials with every combination of the ends of the axes, without learning rate and weight decay.

        Raises:
            UserError: a value is illegal, or there are too many combinations.
        """
        ends = {key: axis.ends[:1] if key in TRIAL_KEYS else axis.ends for key, axis in self.axes.items()}
        if (n_corners := math.prod(map(len, ends.values()))) > _MOST_CORNERS:
            raise UserError(
                f"methods: {self.method}: its sweep has {n_corners:,} combinations of choices and bounds, which are "
                f"checked before Optuna starts; legal: at most {_MOST_CORNERS:,}. Sweep fewer options, or set "
                "search.driver to random"
            )
        return [self.trial(dict(zip(ends, point, strict=True))) for point in itertools.product(*ends.values())]

    def replace_value(self, option: str, old: Any, new: Any) -> "Space":
        """The same space with another value in place of one value of an option."""
        fixed = {key: new if (key, value) == (option, old) else value for key, value in self.fixed.items()}
        axes = dict(self.axes)
        if isinstance(axis := axes.get(option), Choice):
            axes[option] = Choice(choice=[new if value == old else value for value in axis.choice])
        return self.model_copy(update={"fixed": fixed, "axes": axes})


class MethodConfig(StrictModel):
    """One entry of `methods:`, with the trials among which validation chooses.

    Args:
        name: of the method.
        epochs: epochs of a training.
        batch_size: samples of a step.
        head_lr: learning rate of the head; None: that of the trial.
        trials: all points of the search that are known before it starts. With Optuna as many are drawn at random as it
            may propose: it begins with the first of them, and plans and checks are made for them.
        space: what Optuna proposes points from; None if `trials` are all.
    """

    name: str
    epochs: PositiveInt
    batch_size: PositiveInt
    head_lr: Positive | None = Field(None, description="a positive learning rate, or null for that of the method")
    trials: tuple[Trial, ...]
    space: Space | None = None

    @property
    def searched_options(self) -> list[str]:
        """Names of the options whose values the search varies."""
        values = [trial.options.model_dump(mode="json") for trial in self.trials]
        swept = set(self.space.axes) if self.space else set[str]()
        return [name for name in values[0] if name in swept or any(one[name] != values[0][name] for one in values)]

    @property
    def different_options(self) -> list[MethodOptions]:
        """The distinct options of the trials: learning rate and weight decay do not change the model."""
        trials = [*self.trials, *(self.space.corners() if self.space else [])]
        return list({trial.options.model_dump_json(): trial.options for trial in trials}.values())


def parse_methods(
    entries: Iterable[str | dict[str, Any]], defaults: Mapping[str, Any], sweep: Sweep, search: SearchConfig
) -> tuple[MethodConfig, ...]:
    """Parse the entries of `methods:`.

    Args:
        entries: a name, or a dict with a name, options and further keys.
        defaults: values of `TRIAL_KEYS` and `SCHEDULE_KEYS` for entries that do not set them.
        sweep: the section `sweep:`.
        search: the section `search:`.

    Raises:
        UserError: an unknown method, key or an illegal value.
    """
    methods = tuple(_parse_method(entry, defaults, sweep, search) for entry in entries)
    if (n_trials := sum(len(method.trials) for method in methods)) > MOST_TRIALS:
        raise UserError(f"methods: there are {n_trials:,} trials in all; legal: at most {MOST_TRIALS:,}")
    for position, method in enumerate(methods):
        if method in methods[:position]:
            raise UserError(f"methods: {method.name} appears twice with the same options; remove or change one")
    legal_options = {option for method in methods for option in _sweepable(method.name)}
    if unknown := [option for option in sweep if option not in legal_options]:
        legal = ", ".join(sorted(legal_options))
        raise UserError(f"sweep: no method of `methods:` has an option {unknown[0]!r}; legal: {legal}")
    return methods


def parse_trial(name: str, values: Mapping[str, Any]) -> Trial:
    """Parse one point of a method: its options, learning rate and weight decay.

    Raises:
        UserError: an unknown key, or an illegal value.
    """
    method = find_method(name)
    model: type[StrictModel] = method.options
    try:
        options = method.options.model_validate({k: v for k, v in values.items() if k not in TRIAL_KEYS})
        model = Trial
        has = method.hyperparameters
        return Trial(
            options=options,
            lr=values["lr"] if "lr" in has else None,
            weight_decay=values["weight_decay"] if "weight_decay" in has else 0.0,
        )
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, model, _ENTRY_KEYS)}") from error


def _parse_method(
    entry: str | dict[str, Any], defaults: Mapping[str, Any], sweep: Sweep, search: SearchConfig
) -> MethodConfig:
    fixed = {"name": entry} if isinstance(entry, str) else dict(entry)
    name: Any = fixed.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"methods: {show(entry)} has no name; write it as {{name: losa, rank: 8}}")
    try:
        find_method(name)
    except UserError as error:
        raise UserError(f"methods: {error}") from error
    entry_sweep = _parse_sweep(name, fixed.pop("sweep", {}))
    axes = _axes(name, fixed, sweep, entry_sweep)
    _refuse_schedule_of_solved(name, {*fixed, *axes})
    schedule: dict[str, Any] = {key: fixed.pop(key, defaults[key]) for key in SCHEDULE_KEYS}
    trial_values = {key: fixed.pop(key, defaults[key]) for key in TRIAL_KEYS if key not in axes}
    space = Space(method=name, fixed=fixed | trial_values, axes=axes)
    trials = _trials(space, search)
    try:
        method = MethodConfig(name=name, trials=trials, **schedule)
    except ValidationError as error:
        raise UserError(f"methods: {name}: {explain(error, MethodConfig)}") from error
    if search.driver != "optuna" or len(trials) != search.trials:  # the trials are the whole space
        return method
    space.corners()  # refuses too many of them
    return method.model_copy(update={"space": space})


def _parse_sweep(name: str, sweep: Any) -> Sweep:
    try:
        return TypeAdapter(Sweep).validate_python(sweep)
    except ValidationError as error:
        raise UserError(f"methods: {name}: sweep: given {show(sweep)}; legal: {LEGAL_SWEEP}") from error


def _axes(name: str, fixed: Mapping[str, Any], sweep: Sweep, entry_sweep: Sweep) -> dict[str, Range]:
    """The swept keys of a method with their values.

    Args:
        name: of the method.
        fixed: what the entry sets; this is not swept.
        sweep: the section `sweep:`, of which a method takes the options that it has.
        entry_sweep: the entry's own `sweep:`, which has precedence.
    """
    if twice := [option for option in entry_sweep if option in fixed]:
        raise UserError(f"methods: {name}: {twice[0]} is both fixed and swept; keep one of the two")
    sweepable = _sweepable(name)
    if not_swept := [option for option in entry_sweep if option in ("name", "sweep", *SCHEDULE_KEYS)]:
        legal = ", ".join(sorted(sweepable))
        raise UserError(f"methods: {name}: sweep: {not_swept[0]} cannot be swept; legal: {legal}")
    shared = {option: values for option, values in sweep.items() if option in sweepable and option not in fixed}
    return {option: as_axis(values) for option, values in (shared | entry_sweep).items()}


def _trials(space: Space, search: SearchConfig) -> tuple[Trial, ...]:
    """The points that are known before the search: all of a grid, or as many random ones as the budget allows."""
    if not space.axes:
        return (space.trial({}),)
    if search.trials is not None:
        space.ends()  # refuses illegal bounds
        return tuple(space.trial(point) for point in space.draw(search.trials, search.seed))
    name = space.method
    if ranges := [key for key, axis in space.axes.items() if not isinstance(axis, Choice)]:
        raise UserError(
            f"methods: {name}: sweep: {ranges[0]} is a range, and search.driver grid needs a list of values; give one, "
            "or set search.driver to random or optuna, and search.trials to the number of points"
        )
    if (n_points := math.prod(len(axis.ends) for axis in space.axes.values())) > MOST_TRIALS:
        raise UserError(f"methods: {name}: its sweep has {n_points:,} combinations; legal: at most {MOST_TRIALS:,}")
    points = itertools.product(*(axis.ends for axis in space.axes.values()))
    return tuple(space.trial(dict(zip(space.axes, point, strict=True))) for point in points)


def _sweepable(name: str) -> set[str]:
    """The keys of a method that a sweep can vary."""
    method = find_method(name)
    return {*method.hyperparameters, *method.options.model_fields}


def _refuse_schedule_of_solved(name: str, keys: set[str]) -> None:
    method = find_method(name)
    useless = sorted(keys & ({*TRIAL_KEYS, *SCHEDULE_KEYS} - {*method.hyperparameters}))
    if method.solved and useless:
        legal = ", ".join(sorted(_sweepable(name)))
        raise UserError(
            f"methods: {name}: {', '.join(useless)} given; it is not trained step by step, so this has no meaning; "
            f"legal: {legal}"
        )
