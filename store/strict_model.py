"""Defines the base class of all sections of the configuration and of all methods' options."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and values of a wrong type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
