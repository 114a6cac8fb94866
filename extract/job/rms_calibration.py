"""Measures the per-channel RMS of every layer on a few training samples; int8 and int4 divide tokens by it."""

import hashlib
from collections.abc import Sequence

import numpy as np

from extract.forward.encoding import Encoding
from extract.job.extraction_job import ExtractionJob
from extract.job.shard_extractor import report_failures
from store.console.progress import progress
from store.dtypes import channel_rms
from store.errors import JobError
from store.layout import in_groups

CALIBRATION_SAMPLES = 32  # they go through the backbone twice; the error of int8 is the same from 8 to 256 of them


def calibrate(job: ExtractionJob, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Layer -> RMS (dim,) over training samples that are chosen by a fixed hash of their ids.

    Raises:
        UserError: a sample cannot be decoded (`on_error: fail`).
        JobError: none can be decoded; a value is not finite.
    """
    # choose the samples
    forward, split = job.forward(layers), job.source.splits["train"]
    order = sorted(range(len(split)), key=lambda row: hashlib.blake2b(split.ids[row].encode()).digest())
    rows = sorted(order[:CALIBRATION_SAMPLES])
    # collect the mean square of every sample, (dim,)
    mean_squares: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    with progress("measuring channels", len(rows), "samples") as advance:
        for batch in forward.batches(split, in_groups(rows, forward.batch_size(len(rows)))):
            report_failures(batch, split, job.skips_undecodable)
            if batch.images is not None:
                tokens = forward(batch.images)
                # encoding raises if a value is not finite
                Encoding(tokens, [split.ids[row] for row in batch.rows], "float32", {}).result()
                for layer, values in tokens.items():
                    mean_squares[layer].extend(values.double().square().mean(dim=1).cpu().numpy())
            advance(len(batch.rows) + len(batch.failed))
    if not any(mean_squares.values()):
        raise JobError("none of the training samples can be decoded; int8 and int4 need some, to measure the channels")
    return {layer: channel_rms(np.mean(samples, axis=0)) for layer, samples in mean_squares.items()}
