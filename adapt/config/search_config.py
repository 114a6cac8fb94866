"""Settings of the search: how the trials of a method are chosen from its sweep, and which are dropped early."""

from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, model_validator

from store.config import PositiveInt
from store.errors import UserError
from store.strict_model import StrictModel

MOST_TRIALS = 10_000  # stops a mistake such as a sweep over six options


class HalvingConfig(StrictModel):
    """Successive halving: candidates that are behind after a few epochs are not trained further.

    Args:
        factor: at each rung one of so many candidates goes on.
        min_epochs: epochs before the first rung; None for a third of all. Each further rung comes after `factor` times
            as many.
    """

    factor: Annotated[int, Field(ge=2)] = 2
    min_epochs: PositiveInt | None = Field(
        None, description="a positive whole number of epochs, or null for a third of them"
    )


class SearchConfig(StrictModel):
    """How the trials of a method are chosen from its sweep.

    Args:
        driver: grid trains every combination; random draws points; optuna proposes them in batches with its
            tree-structured Parzen estimator.
        trials: points of each method that is searched, with random and optuna.
        batch: points that Optuna proposes at once, before it is told their scores.
        seed: of the points that are drawn.
        epochs: epochs of each trial of a search; None for as many as in training.
    """

    driver: Literal["grid", "random", "optuna"] = "grid"
    trials: Annotated[int, Field(gt=0, le=MOST_TRIALS)] | None = Field(
        None, description=f"with driver random or optuna a positive whole number, at most {MOST_TRIALS:,}; else null"
    )
    batch: PositiveInt = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    epochs: PositiveInt | None = Field(
        None, description="a positive whole number of epochs, or null for as many as in training"
    )

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if self.driver == "grid" and self.trials is not None:
            raise UserError(
                f"search.trials: given {self.trials}, but search.driver grid trains every combination of the sweep; "
                "leave it out, or set search.driver to random or optuna"
            )
        if self.driver != "grid" and self.trials is None:
            raise UserError(f"search.trials is missing: search.driver {self.driver} needs a number, such as 32")
        if self.driver == "optuna" and find_spec("optuna") is None:
            raise UserError(
                "search.driver optuna needs Optuna; install it with: pip install 'sidecache[optuna]', "
                "or set search.driver to random"
            )
        return self
