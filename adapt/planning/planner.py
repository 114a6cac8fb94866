"""Makes the plan of a job from its facts and measured speeds."""

import os
from collections.abc import Mapping

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from adapt.config.pipeline import Config
from adapt.features.choice import Choice, choose_source
from adapt.job.cost import break_even_epochs
from adapt.job.trial_count import trials_of
from adapt.planning.job_facts import JobFacts
from adapt.planning.other_machine import OtherMachine
from adapt.planning.plan import Plan
from adapt.planning.proposals import Proposal, propose
from adapt.planning.speeds import Speeds, measure_speeds
from adapt.planning.totals import Reading, training_seconds
from extract.forward.device import free_memory_bytes, resolve_device
from extract.job.rms_calibration import CALIBRATION_SAMPLES
from store.dtypes import CODES
from store.errors import UserError

_BYTES = TypeAdapter(ByteSize)
_SOURCES = ("resident", "streamed", "online")
_BUSY = 0.75  # of the cores, by programs that run or wait to run


def parse_bytes(text: str) -> int:
    """Parse a number of bytes such as `20GB` or `500MiB`."""
    try:
        return int(_BYTES.validate_python(text))
    except ValidationError as error:
        raise UserError(
            f"--budget {text!r} is not a number of bytes; legal: such as 20GB, 500MiB or 1000000"
        ) from error


def make_plan(
    config: Config, budget: int | None = None, with_speeds: bool = True, machine: OtherMachine | None = None
) -> Plan:
    """Estimate what a job will cost, without extracting or keeping anything; missing data leave values unknown.

    Args:
        budget: bytes that the store may take.
        with_speeds: false leaves out the measurements, and all values that depend on them.
        machine: figures of the machine that the job will run on, where it is not this one.

    Raises:
        UserError: the configuration does not name a backbone that can be built.
    """
    job = JobFacts(config)
    speeds = measure_speeds(job) if with_speeds else None
    return plan_job(job, machine.speeds(speeds, job) if machine and speeds else speeds, budget)


def plan_job(job: JobFacts, speeds: Speeds | None, budget: int | None = None) -> Plan:
    """Make the plan of a job within a budget of bytes; without `speeds` all values that depend on them are unknown."""
    rows, to_extract, bytes_per_sample = job.rows, job.rows_to_extract, job.schema.bytes_per_sample
    store_bytes = None if rows is None else sum(rows.values()) * bytes_per_sample
    fits = _fits(job, store_bytes, budget)
    seconds = _seconds_a_sample(job, speeds)
    extract_seconds = _extract_seconds(job, seconds)
    epoch_seconds = _epoch_seconds(job, seconds)
    choice = _choose_source(job)
    train = _training_seconds(job, speeds, choice, epoch_seconds)
    return Plan(
        samples=rows,
        views=job.schema.views,
        layers=job.schema.layers,
        num_tokens=job.schema.token_layout.num_tokens,
        dim=job.schema.dim,
        dtype=job.schema.dtype,
        bytes_per_sample=bytes_per_sample,
        store_bytes=store_bytes,
        upper_bound=job.schema.compressor is not None,
        free_bytes=job.free_bytes,
        budget_bytes=budget,
        fits=fits,
        samples_to_extract=to_extract,
        method=job.stepwise.name,
        extract_seconds=extract_seconds,
        epoch_seconds=epoch_seconds,
        unstored_samples=job.unstored_rows,
        unstored_seconds=_unstored_seconds(job, speeds),
        samples_per_second={name: 1 / value for name, value in seconds.items()},
        break_even_epochs=_break_even(extract_seconds, epoch_seconds, choice.kind),
        trials=_number_of_trials(job),
        train_seconds=train.get(choice.kind),
        total_seconds=_total_seconds(train, extract_seconds, fits),
        feature_source=choice.kind,
        reason=choice.reason,
        proposals=_proposals(job, budget) if fits is False and choice.kind != "online" else [],
        notes=job.notes + (_notes_of_load() if speeds else []),
    )


def _notes_of_load() -> list[str]:
    """A note if other programs keep the cores busy, so that what was measured is too slow; none on Windows."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < _BUSY * cores:
        return []
    return [f"other programs keep this machine busy (load {load:.1f} on {cores} cores): the job is faster without them"]


def _seconds_a_sample(job: JobFacts, speeds: Speeds | None) -> dict[str, float]:
    """Seconds a sample, by `extract` or the feature source of training; none if nothing was measured."""
    if speeds is None:
        return {}
    by_source = {
        "extract": max(_encoding_seconds(speeds), speeds.write or 0.0),
        **speeds.steps,
        "online": speeds.steps["resident"] + _with_decoding(speeds, speeds.forward),
    }
    if speeds.end_to_end is not None:
        by_source["end_to_end"] = _with_decoding(speeds, speeds.end_to_end)
    return by_source


def _encoding_seconds(speeds: Speeds) -> float:
    """Seconds a sample from its file to its encoded tokens, on all devices."""
    return _with_decoding(speeds, (speeds.forward + speeds.encode) / max(1, speeds.gpus))


def _with_decoding(speeds: Speeds, seconds: float) -> float:
    """A GPU works while the cores decode; a backbone on the CPU needs the same cores."""
    decode = (speeds.decode or 0.0) / speeds.cores
    return max(seconds, decode) if speeds.gpus else seconds + decode


def _readings(job: JobFacts, speeds: Speeds, choice: Choice) -> dict[str, Reading]:
    """What each feature source that is possible adds to the time of training."""
    online, unstored = _with_decoding(speeds, speeds.forward), _encoding_seconds(speeds)
    readings = {"online": Reading(epoch=online, once=online, unstored=online)}
    if choice.kind == "resident":
        readings["resident"] = Reading(epoch=0.0, once=speeds.read, unstored=unstored, first=speeds.read)
    if choice.kind != "online" and "streamed" in speeds.steps:
        cold = speeds.read_cold or 0.0 if _training_bytes(job) > free_memory_bytes(torch.device("cpu")) else 0.0
        epoch, once = max(speeds.waiting("streamed"), cold), max(speeds.read, cold)
        readings["streamed"] = Reading(epoch=epoch, once=once, unstored=unstored)
    return readings


def _fits(job: JobFacts, store_bytes: int | None, budget: int | None) -> bool | None:
    """Whether the store fits the disk and the budget; None if the samples are unknown."""
    if store_bytes is None or job.rows_to_extract is None:
        return None
    has_room = job.free_bytes is None or job.rows_to_extract * job.schema.bytes_per_sample <= job.free_bytes
    return has_room and (budget is None or store_bytes <= budget)


def _training_seconds(
    job: JobFacts, speeds: Speeds | None, choice: Choice, epoch_seconds: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Seconds of all training by feature source that is possible; none if nothing was measured."""
    if speeds is None:
        return {}
    seconds = training_seconds(job, speeds, _readings(job, speeds, choice), epoch_seconds.get("end_to_end"))
    side_by_side = max(1, min(speeds.gpus, _number_of_trials(job)))
    return {source: None if taken is None else taken / side_by_side for source, taken in seconds.items()}


def _number_of_trials(job: JobFacts) -> int:
    return sum(trials.number for trials in trials_of(job.config))


def _total_seconds(
    train_seconds: Mapping[str, float | None], extract_seconds: float | None, fits: bool | None
) -> dict[str, float | None]:
    """Seconds of training with those of the extraction; features from a store are no choice if it does not fit."""
    totals = {}
    for source, seconds in train_seconds.items():
        if source == "online":
            totals[source] = seconds
        elif fits is not False:
            totals[source] = None if seconds is None or extract_seconds is None else seconds + extract_seconds
    return totals


def _epoch_seconds(job: JobFacts, seconds: Mapping[str, float]) -> dict[str, float | None]:
    sources = (*_SOURCES, "end_to_end") if job.end_to_end else _SOURCES
    return {source: _times(seconds.get(source), job.trained_rows) for source in sources}


def _times(seconds: float | None, rows: int | None) -> float | None:
    return None if seconds is None or rows is None else seconds * rows


def _unstored_seconds(job: JobFacts, speeds: Speeds | None) -> float | None:
    """Seconds of one pass of the backbone over the splits that are not stored."""
    if speeds is None or job.unstored_rows is None:
        return None
    return sum(job.unstored_rows.values()) * _encoding_seconds(speeds)


def _extract_seconds(job: JobFacts, seconds: Mapping[str, float]) -> float | None:
    """Seconds for all rows to extract, and for the training samples that calibrate a new int8 or int4 store."""
    rows = job.rows_to_extract
    if rows is not None and job.rows and job.store is None and job.schema.dtype in CODES:
        rows += min(CALIBRATION_SAMPLES, job.rows["train"])
    return _times(seconds.get("extract"), rows)


def _break_even(extract_seconds: float | None, epoch: Mapping[str, float | None], source: str) -> float | None:
    online, cached = epoch["online"], epoch.get(source)
    if extract_seconds is None or online is None or cached is None:
        return None
    return break_even_epochs(extract_seconds, online_seconds=online, cached_seconds=cached)


def _choose_source(job: JobFacts) -> Choice:
    """The feature source that the training will choose; see `adapt.features.choice.choose_source`."""
    configured = job.config.train.feature_source
    if configured == "auto" and job.rows is None:
        return Choice("auto", "the number of samples is not known")
    return choose_source(configured, _training_bytes(job), resolve_device(job.config.train.device))


def _training_bytes(job: JobFacts) -> int:
    """Stored bytes of what training reads: all views of the training samples, in the layers of the methods."""
    return job.schema.bytes_of(job.training_rows, job.layers_read)


def _proposals(job: JobFacts, budget: int | None) -> list[Proposal]:
    assert job.rows is not None
    n_bytes = min(n for n in (job.free_bytes, budget) if n is not None)
    return propose(job, job.rows, n_bytes)
