"""The chosen batch is the largest of which two fit into memory at a time."""

import pytest
import torch

from extract.forward.batch_size import choose_batch_size

GPU = torch.device("meta")  # any device but the CPU; `run` decides what fits


class Memory:
    """Memory for `room` images, including those of results that are still referenced."""

    def __init__(self, room: int) -> None:
        self._room, self._held, self.tried = room, 0, list[int]()

    def run(self, size: int) -> "Taken":
        self.tried.append(size)
        if self._held + size > self._room:
            raise torch.OutOfMemoryError(f"no room for {size} beside {self._held}")
        return Taken(self, size)

    def take(self, size: int) -> None:
        self._held += size


class Taken:
    def __init__(self, memory: Memory, size: int) -> None:
        self._memory, self._size = memory, size
        memory.take(size)

    def __del__(self) -> None:
        self._memory.take(-self._size)


@pytest.mark.parametrize(
    ("room", "frames", "size"),
    [(5000, 1, 512), (1024, 1, 512), (1023, 1, 256), (100, 1, 32), (1, 1, 1), (0, 1, 1), (5000, 16, 32), (12, 16, 4)],
)
def test_a_gpu_takes_the_largest_that_fits_twice(room: int, frames: int, size: int) -> None:
    memory = Memory(room)
    assert choose_batch_size(GPU, memory.run, 10**6, frames) == size
    assert memory.tried[0] == max(1, 512 // frames)


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (512, 512), (513, 512)])
def test_no_larger_batch_is_tried_than_there_are_samples(samples: int, size: int) -> None:
    memory = Memory(5000)
    assert choose_batch_size(GPU, memory.run, samples) == size
    assert set(memory.tried) <= {size}


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(size: int) -> None:
        raise RuntimeError("no kernel for this device")

    with pytest.raises(RuntimeError, match="no kernel"):
        choose_batch_size(GPU, run, 99)


@pytest.mark.parametrize(("frames", "size"), [(1, 16), (8, 2), (32, 1)])
def test_a_cpu_takes_what_stays_in_its_caches(frames: int, size: int) -> None:
    assert choose_batch_size(torch.device("cpu"), Memory(0).run, 99, frames) == size
