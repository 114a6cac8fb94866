"""Draws up the plan of a job, from what is known of it and a few seconds of measurement."""

import os
from collections.abc import Mapping

from pydantic import ByteSize, TypeAdapter, ValidationError

from adapt.config.pipeline import Config
from adapt.features.choice import Choice, choose_source
from adapt.job.cost import break_even_epochs
from adapt.planning.calibration import Planned, Speeds, calibrate
from adapt.planning.plan import Plan
from adapt.planning.proposals import Proposal, propose
from adapt.planning.survey import Survey
from extract.forward.device import resolve_device
from extract.job.int8_calibration import CALIBRATION_SAMPLES
from store.errors import UserError

_BYTES = TypeAdapter(ByteSize)
_SOURCES = ("resident", "streamed", "online")


def parse_bytes(text: str) -> int:
    """`20GB` or `500MiB` as a number of bytes."""
    try:
        return int(_BYTES.validate_python(text))
    except ValidationError as error:
        raise UserError(
            f"--budget {text!r} is no number of bytes; legal are such as 20GB, 500MiB or 1000000"
        ) from error


def draw_up_plan(config: Config, budget: int | None = None, calibrated: bool = True) -> Plan:
    """Say what a job will cost. Nothing is extracted or kept; data that are not here leave their figures open.

    Args:
        budget: bytes that the store may take.
        calibrated: false leaves out the measurements, and every figure that rests on them.

    Raises:
        UserError: the configuration names no backbone that could be built.
    """
    job = Survey(config)
    seconds = _sample_seconds(job, calibrate(_planned(job))) if calibrated else {}
    return _draw_up(job, seconds, budget)


def _planned(job: Survey) -> Planned:
    images = job.source.splits["train"] if job.source else None
    return Planned(job.config, job.shape, job.schema, job.spec, job.stepwise, job.end_to_end, images)


def _sample_seconds(job: Survey, speeds: Speeds) -> dict[str, float]:
    """Seconds a sample of extraction, and of training by what it reads."""
    decode = (speeds.decode or 0.0) / (os.cpu_count() or 1)
    on_gpu = resolve_device(job.config.extract.device).type == "cuda"

    def beside_decoding(seconds: float) -> float:
        """A GPU works while the cores decode; the backbone on the CPU wants the same cores."""
        return max(seconds, decode) if on_gpu else seconds + decode

    extract = max(beside_decoding(speeds.forward + speeds.encode), speeds.write or 0.0)
    online = speeds.steps["resident"] + beside_decoding(speeds.forward)
    through = {} if speeds.end_to_end is None else {"end_to_end": beside_decoding(speeds.end_to_end)}
    return {"extract": extract, **speeds.steps, "online": online, **through}


def _draw_up(job: Survey, seconds: Mapping[str, float], budget: int | None) -> Plan:
    rows, missing, row_bytes = job.rows, job.rows_to_extract, job.schema.bytes_per_sample
    store_bytes = None if rows is None else sum(rows.values()) * row_bytes
    fits = None
    if store_bytes is not None and missing is not None:
        has_room = job.free_bytes is None or missing * row_bytes <= job.free_bytes
        fits = has_room and (budget is None or store_bytes <= budget)
    trained_on = None if rows is None else round(rows["train"] * (1 - job.config.data.val_fraction))
    extract_seconds = _extract_seconds(job, seconds)
    sources = (*_SOURCES, *(["end_to_end"] if job.end_to_end else []))
    epoch_seconds = {source: _times(seconds.get(source), trained_on) for source in sources}
    choice = _choose(job)
    return Plan(
        samples=rows,
        views=job.schema.views,
        layers=job.schema.layers,
        num_tokens=job.schema.token_layout.num_tokens,
        dim=job.schema.dim,
        dtype=job.schema.dtype,
        bytes_per_sample=row_bytes,
        store_bytes=store_bytes,
        upper_bound=job.schema.compressor is not None,
        free_bytes=job.free_bytes,
        budget_bytes=budget,
        fits=fits,
        samples_to_extract=missing,
        method=job.stepwise.name,
        extract_seconds=extract_seconds,
        epoch_seconds=epoch_seconds,
        samples_per_second={name: 1 / value for name, value in seconds.items()},
        break_even_epochs=_break_even(extract_seconds, epoch_seconds, choice.kind),
        feature_source=choice.kind,
        reason=choice.reason,
        proposals=_proposals(job, budget) if fits is False and choice.kind != "online" else [],
        notes=job.notes,
    )


def _times(seconds: float | None, rows: int | None) -> float | None:
    return None if seconds is None or rows is None else seconds * rows


def _extract_seconds(job: Survey, seconds: Mapping[str, float]) -> float | None:
    """Of the rows that are missing; a new int8 store looks at some samples of the training split before it starts."""
    rows = job.rows_to_extract
    if rows is not None and job.rows and job.store is None and job.schema.dtype == "int8":
        rows += min(CALIBRATION_SAMPLES, job.rows["train"])
    return _times(seconds.get("extract"), rows)


def _break_even(extract: float | None, epoch: Mapping[str, float | None], source: str) -> float | None:
    online, cached = epoch["online"], epoch.get(source)
    if extract is None or online is None or cached is None or online <= cached:
        return None
    return break_even_epochs(extract, online - cached, 1, 1)


def _choose(job: Survey) -> Choice:
    """What `train.feature_source` will come to; see `adapt.features.choice.choose_source`."""
    wanted = job.config.train.feature_source
    if wanted == "auto" and job.rows is None:
        return Choice("auto", "the number of samples is not known")
    n_bytes = job.schema.bytes_of(job.rows["train"], job.needed) if job.rows else 0
    return choose_source(wanted, n_bytes, resolve_device(job.config.train.device))


def _proposals(job: Survey, budget: int | None) -> list[Proposal]:
    assert job.rows is not None
    room = min(n for n in (job.free_bytes, budget) if n is not None)
    store, shape, rows = job.config.store, job.shape, sum(job.rows.values())
    return propose(store, lambda s: job.schema_of(s).bytes_per_sample, shape.layout, shape.depth, rows, room, job.works)
