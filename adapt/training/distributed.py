"""Data-parallel training: `torchrun --nproc-per-node 4 -m sidecache run pipeline.yaml` starts one process a GPU.

Every process takes its shard of the parts of a batch, the gradients are summed by an all-reduce, and every process
takes the same step. The loss of a part is divided by the size of the whole batch, so that the sum is the gradient that
a single process would compute. Unlike DistributedDataParallel, this allows batches that cannot be divided evenly: a
process without a part contributes zeros.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adapt.run_dir.lock import hold_run_dir

_TIMEOUT = timedelta(days=30)  # of a collective operation: all processes wait while the main one extracts
_RESUMED_FROM = ("results.json", "intrinsic.json", "adaptors", "checkpoints", "search")


@dataclass(frozen=True)
class World:
    """The group of processes that train together, as seen from one of them."""

    rank: int
    size: int

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which extracts, writes files and prints."""
        return self.rank == 0

    def shard(self, parts: Sequence[Any]) -> list[Any]:
        """The parts of a batch that this process trains on."""
        return list(parts[self.rank :: self.size])

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of all processes, in place."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def broadcast(self, value: Any) -> Any:
        """Send a JSON value from rank 0 to all processes, and return it.

        `broadcast_object_list` is not used: it unpickles, and gloo accepts connections from anyone.
        """
        if self.size == 1:
            return value
        content = bytearray(json.dumps(value).encode() if self.is_main_process else b"")
        # the receivers need the length first
        n_bytes = torch.tensor(len(content))
        dist.broadcast(n_bytes, src=0)
        message = (
            torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(int(n_bytes), dtype=torch.uint8)
        )
        dist.broadcast(message, src=0)
        return json.loads(message.numpy().tobytes())

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """The process group that torchrun started; without torchrun, this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Tensors on the CPU go through gloo: NCCL's barrier would give up during a long extraction.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    return World(dist.get_rank(), size)


@contextmanager
def own_run_dir(run_dir: Path) -> Iterator[Path]:
    """The run directory, locked, on rank 0; on every other rank a temporary copy of what a job resumes from.

    Raises:
        UserError: the directory cannot be created.
        JobError: another job is running in it.
    """
    here = world()
    with TemporaryDirectory() as scratch, hold_run_dir(run_dir) if here.is_main_process else nullcontext():
        if not here.is_main_process:
            _copy_results(run_dir, Path(scratch))
        here.barrier()  # rank 0 writes nothing before all have copied
        yield run_dir if here.is_main_process else Path(scratch)
        here.barrier()


def _copy_results(run_dir: Path, copy: Path) -> None:
    """Copy results, searches and checkpoints; the directory may also hold a store, which can be large."""
    for name in _RESUMED_FROM:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, copy / name)
        elif (run_dir / name).is_file():
            shutil.copy(run_dir / name, copy / name)
