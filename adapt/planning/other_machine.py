"""Turns speeds that were measured on this machine into those of another one, of which a few figures are known."""

from dataclasses import asdict, dataclass, replace

from adapt.planning.job_facts import JobFacts
from adapt.planning.speeds import Speeds
from store.errors import UserError

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class OtherMachine:
    """Figures of a machine; None for what is as it is here.

    Args:
        device_tflops: 10^12 operations a second that a device sustains in matrix products, 2 for a multiply-add.
        read_gbps: 10^9 bytes a second that the disk of the store reads, and writes.
        gpus: devices that extract, and that train trials side by side.
        cores: that decode samples.
    """

    device_tflops: float | None = None
    read_gbps: float | None = None
    gpus: int | None = None
    cores: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {value:g}; legal: a number above 0")

    @property
    def description(self) -> str:
        """The figures that are given, such as `2 GPUs, 400 TFLOP/s`; empty if there are none."""
        figures = [
            f"{self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else "",
            f"{self.device_tflops:g} TFLOP/s" if self.device_tflops else "",
            f"{self.cores} core{'s' * (self.cores > 1)}" if self.cores else "",
            f"a disk of {self.read_gbps:g} GB/s" if self.read_gbps else "",
        ]
        return ", ".join(filter(None, figures))

    def speeds(self, measured: Speeds, job: JobFacts) -> Speeds:
        """The speeds of a job on this machine, from those measured here.

        What the device computes scales with its rate. That is too fast for training steps on few tokens, which wait
        for the launch of small kernels.
        """
        speeds = measured
        if self.device_tflops is not None:
            speeds = _on_device(speeds, speeds.forward_flops / (self.device_tflops * _TERA) / speeds.forward)
        if self.read_gbps is not None:
            speeds = _from_disk(speeds, job, self.read_gbps * _GIGA)
        return replace(speeds, gpus=self.gpus or speeds.gpus, cores=self.cores or speeds.cores)


def _on_device(speeds: Speeds, ratio: float) -> Speeds:
    """All seconds that a device computes, times a ratio; waiting for the disk stays."""
    steps = {source: ratio * speeds.steps["resident"] + speeds.waiting(source) for source in speeds.steps}
    trials = tuple(replace(one, points=ratio * one.points, seeds=ratio * one.seeds) for one in speeds.trials)
    return replace(
        speeds,
        forward=ratio * speeds.forward,
        encode=ratio * speeds.encode,
        end_to_end=None if speeds.end_to_end is None else ratio * speeds.end_to_end,
        steps=steps,
        trials=trials,
    )


def _from_disk(speeds: Speeds, job: JobFacts, rate: float) -> Speeds:
    """With a disk that reads and writes so many bytes a second; steps wait for what it reads while they compute."""
    resident, n_bytes = speeds.steps["resident"], job.schema.bytes_of(1, job.layers_read)
    steps = {"resident": resident, "streamed": max(resident, n_bytes / rate)}
    return replace(
        speeds,
        write=job.schema.bytes_per_sample / rate,
        read=max(speeds.read, n_bytes / rate),
        read_cold=n_bytes / rate,
        steps=steps,
    )
