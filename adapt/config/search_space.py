"""Values of an option that a sweep tries: a list of choices, or a range from which numbers are drawn.

A point of a space is described by one coordinate an axis: the position in the list for choices, else the number itself.
"""

import math
from abc import abstractmethod
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from store.strict_model import StrictModel

Coordinate = int | float
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]  # exact as a float too, which Optuna computes with

LEGAL_SWEEP = (
    "{option: [values]} or {option: RANGE}, where RANGE is {uniform: [low, high]}, {int_uniform: [low, high]}, "
    "{log_uniform: [low, high]} above 0, or {choice: [values]}, with low below high"
)


class Axis(StrictModel):
    """The legal values of one swept option."""

    @property
    @abstractmethod
    def ends(self) -> list[Coordinate]:
        """The two bounds of a range, or the positions of all choices."""

    @property
    def size(self) -> Coordinate:
        """How many coordinates there are."""
        return math.inf

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Coordinate:
        """A coordinate at random."""

    def value(self, coordinate: Coordinate) -> Any:
        """The value of the option at a coordinate."""
        return coordinate


class Choice(Axis):
    """One of some values of any type."""

    choice: Annotated[list[Any], Field(min_length=1)]

    @property
    def ends(self) -> list[Coordinate]:
        """See `Axis.ends`."""
        return list(range(len(self.choice)))

    @property
    def size(self) -> Coordinate:
        """See `Axis.size`."""
        return len(self.choice)

    def draw(self, rng: np.random.Generator) -> Coordinate:
        """See `Axis.draw`."""
        return int(rng.integers(len(self.choice)))

    def value(self, coordinate: Coordinate) -> Any:
        """See `Axis.value`."""
        return self.choice[int(coordinate)]


class LogUniform(Axis):
    """A positive number whose logarithm is distributed uniformly between two bounds."""

    log_uniform: Annotated[tuple[Number, Number], Field(strict=False)]

    @field_validator("log_uniform")
    @classmethod
    def _check(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] <= 0:
            raise ValueError("the lower bound is not above 0")
        _require_ascending(*bounds)
        return bounds

    @property
    def ends(self) -> list[Coordinate]:
        """See `Axis.ends`."""
        return list(self.log_uniform)

    def draw(self, rng: np.random.Generator) -> Coordinate:
        """See `Axis.draw`."""
        low, high = self.log_uniform
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(drawn, low), high)  # rounding may go beyond a bound


class Uniform(Axis):
    """A number between two bounds."""

    uniform: Annotated[tuple[Number, Number], Field(strict=False)]

    @field_validator("uniform")
    @classmethod
    def _check(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if math.isinf(bounds[1] - bounds[0]):
            raise ValueError("the range is too wide")
        _require_ascending(*bounds)
        return bounds

    @property
    def ends(self) -> list[Coordinate]:
        """See `Axis.ends`."""
        return list(self.uniform)

    def draw(self, rng: np.random.Generator) -> Coordinate:
        """See `Axis.draw`."""
        return float(rng.uniform(*self.uniform))


class IntUniform(Axis):
    """A whole number between two bounds, both included."""

    int_uniform: Annotated[tuple[Whole, Whole], Field(strict=False)]

    @field_validator("int_uniform")
    @classmethod
    def _check(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        _require_ascending(*bounds)
        return bounds

    @property
    def ends(self) -> list[Coordinate]:
        """See `Axis.ends`."""
        return list(self.int_uniform)

    @property
    def size(self) -> Coordinate:
        """See `Axis.size`."""
        return self.int_uniform[1] - self.int_uniform[0] + 1

    def draw(self, rng: np.random.Generator) -> Coordinate:
        """See `Axis.draw`."""
        return int(rng.integers(*self.int_uniform, endpoint=True))


Range = Choice | LogUniform | Uniform | IntUniform
SweptValues = Annotated[list[Any], Field(min_length=1)] | Range


def as_axis(values: list[Any] | Range) -> Range:
    """The axis of the values that a sweep gives an option."""
    return Choice(choice=values) if isinstance(values, list) else values


def _require_ascending(low: Coordinate, high: Coordinate) -> None:
    if low >= high:
        raise ValueError("the lower bound is not below the upper one")
