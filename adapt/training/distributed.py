"""Data-parallel training: `torchrun --nproc-per-node 4 -m sidecache run pipeline.yaml`, one process a GPU.

Every process takes its share of the parts of a batch, the gradients are summed, and all take the same step; since the
loss of a part is its share of the whole batch's, the sum is the gradient that one process would have had. Batches need
no common divisor, and a process without a part adds zeros (which DistributedDataParallel would not allow).
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

_PATIENCE = timedelta(days=30)
_PROGRESS = ("results.json", "intrinsic.json", "adaptors", "checkpoints", "search")


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def shard(self, parts: Sequence[Any]) -> list[Any]:
        """The parts of a batch that fall to this process."""
        return list(parts[self.rank :: self.size])

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in place."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def broadcast(self, value: Any) -> Any:
        """What the process that leads says, of values that JSON has; the others wait for it.

        Not `broadcast_object_list`, which unpickles what arrives: the connections of gloo let in whoever reaches them.
        """
        if self.size == 1:
            return value
        content = bytearray(json.dumps(value).encode() if self.is_main_process else b"")
        n_bytes = torch.tensor(len(content))
        dist.broadcast(n_bytes, src=0)
        message = (
            torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(int(n_bytes), dtype=torch.uint8)
        )
        dist.broadcast(message, src=0)
        return json.loads(message.numpy().tobytes())

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """The processes that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Objects and barriers go by way of gloo: who waits for the extraction waits as long as that takes.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    return World(dist.get_rank(), size)


@contextmanager
def own_run_dir(run_dir: Path) -> Iterator[Path]:
    """The run directory for the process that leads; for every other one a copy that goes when the work is done.

    Raises:
        UserError: no folder can be made there.
        JobError: another job is at work in it.
    """
    here = world()
    with TemporaryDirectory() as scratch, hold_run_dir(run_dir) if here.is_main_process else nullcontext():
        if not here.is_main_process:
            _copy_progress(run_dir, Path(scratch))
        here.barrier()  # nothing is written before all have their copy
        yield run_dir if here.is_main_process else Path(scratch)
        here.barrier()


def _copy_progress(run_dir: Path, copy: Path) -> None:
    """What tells a job how far it is; of what else lies in a run directory, a store may be large."""
    for name in _PROGRESS:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, copy / name)
        elif (run_dir / name).is_file():
            shutil.copy(run_dir / name, copy / name)
