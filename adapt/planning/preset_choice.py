"""Resolves `store.preset: auto`: a pilot chooses the preset once, and `pilot.json` of the run directory keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adapt.config.pipeline import Config
from adapt.job.inputs import Inputs
from adapt.planning.pilot import Pilot, run_pilot
from adapt.run_dir.files import damaged, make_run_dir, read_json, write_json
from adapt.training.distributed import world
from store.config import PRESETS
from store.errors import UserError

_NAME = "pilot.json"


class _Document(BaseModel):
    """The content of `pilot.json`: a pilot, and what decides its outcome."""

    model_config = ConfigDict(extra="forbid")

    job: dict[str, Any]
    pilot: Pilot


def known_pilot(config: Config, own_source: str = "") -> Pilot | None:
    """The pilot in the run directory of a job; None if there is none, or it was of another job.

    Args:
        config: the configuration.
        own_source: name of the samples of the user, instead of `data:`.

    Raises:
        JobError: the file is damaged.
    """
    path = _file(config)
    if not path.exists():
        return None
    try:
        document = _Document.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return document.pilot if document.job == _describe(config, own_source) else None


def find_pilot(config: Config, inputs: Inputs, log: Callable[[str], None]) -> Pilot:
    """The pilot of a job, which is run if it has not been; under torchrun by the main process alone.

    Args:
        config: the configuration.
        inputs: its samples and backbone.
        log: is called with the choice.

    Raises:
        UserError, JobError: as of `run_pilot`.
    """
    here = world()
    if not here.is_main_process:
        return Pilot.model_validate_json(here.broadcast(""))
    own_source = inputs.own_source.name if inputs.own_source else ""
    pilot = known_pilot(config, own_source)
    if pilot is None:
        pilot = run_pilot(config, inputs)
        make_run_dir(config.run_dir)
        document = _Document(job=_describe(config, own_source), pilot=pilot)
        write_json(_file(config), document.model_dump(mode="json"))
        log(f"pilot of {pilot.n_samples:,} samples in {pilot.seconds:.0f} s: store.preset {pilot.chosen}")
    here.broadcast(pilot.model_dump_json())
    return pilot


def resolve_preset(config: Config, inputs: Inputs, log: Callable[[str], None]) -> Config:
    """The configuration with the preset that its pilot chooses in place of `auto`; see `find_pilot`."""
    if config.store.preset != "auto":
        return config
    return at_preset(config, find_pilot(config, inputs, log).chosen)


def require_preset(config: Config, own_source: str = "") -> Config:
    """The configuration with the preset that its pilot has chosen in place of `auto`.

    Raises:
        UserError: no pilot has chosen yet.
        JobError: `pilot.json` is damaged.
    """
    if config.store.preset != "auto":
        return config
    pilot = known_pilot(config, own_source)
    if pilot is None:
        raise UserError(
            f"store.preset is auto, and {_file(config)} has no pilot of this job; run `sidecache extract` or "
            f"`sidecache plan --pilot` first, or set it to {', '.join(PRESETS)}"
        )
    return at_preset(config, pilot.chosen)


def at_preset(config: Config, preset: str) -> Config:
    """The configuration at a preset; see `StoreConfig.at_preset`."""
    return config.model_copy(update={"store": config.store.at_preset(preset)})


def _file(config: Config) -> Path:
    return config.run_dir / _NAME


def _describe(config: Config, own_source: str) -> dict[str, Any]:
    """The job that a choice holds for; it stays as it is for other methods and for new samples."""
    given = config.store.model_fields_set & {"layers", "tokens", "dtype"}
    return {
        "data": config.data.model_dump(mode="json"),
        "own_source": own_source,
        "backbone": config.backbone.model_dump(mode="json"),
        "store": config.store.model_dump(mode="json", include=given),
    }
