"""Dropout that is fast on a CPU, and whose random numbers several models can share.

`torch.nn.Dropout` draws a double for every value; here a mask takes one random byte, which is seven times faster.
"""

from collections.abc import Callable, Sequence
from itertools import count

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

Draw = Callable[[int, torch.device], UInt8[Tensor, "size"]]


def draw_bytes(size: int, device: torch.device, generator: torch.Generator | None = None) -> UInt8[Tensor, "size"]:
    """Draw random bytes.

    Args:
        size: how many.
        device: where they are.
        generator: of that device; None for torch's global one.
    """
    words = torch.empty(-(-size // 8), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:size]


class ByteDropout(nn.Module):
    """`torch.nn.Dropout` with a rate rounded to 1/256, and 255/256 at most.

    Args:
        p: share of the values that are set to zero in training; the others are scaled up to keep the mean.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped = min(255, round(256 * p))  # of the 256 values of a byte

    def forward(self, x: Float[Tensor, "..."], draw: Draw = draw_bytes) -> Float[Tensor, "..."]:
        """Drop values in training; the identity in evaluation.

        Args:
            x: the values.
            draw: gives the random bytes.
        """
        factors = self.factors(x.shape, x, draw)
        return x if factors is None else x * factors

    def factors(self, shape: Sequence[int], like: Tensor, draw: Draw) -> Float[Tensor, "..."] | None:
        """The factors of values of this shape, with type and device of `like`; None if nothing is dropped."""
        if not self.training or not self.dropped:
            return None
        mask = draw(torch.Size(shape).numel(), like.device).view(*shape) >= self.dropped
        return mask.to(like.dtype).mul_(256 / (256 - self.dropped))


def shared_draws(generators: Sequence[torch.Generator]) -> list[Draw]:
    """For every model of a stack, the bytes that it would draw alone; models with the same generator share them.

    Args:
        generators: of every model. Models with the same one must draw equally many bytes, in the same order, or none.
    """
    streams: dict[int, _ByteStream] = {}
    return [streams.setdefault(id(generator), _ByteStream(generator)).reader() for generator in generators]


class _ByteStream:
    """Remembers what was drawn from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: list[Tensor] = []

    def reader(self) -> Draw:
        """A function that gives the bytes from the first on, and draws those that no reader had yet."""
        numbers = count()

        def draw(size: int, device: torch.device) -> Tensor:
            number = next(numbers)
            if number == len(self._drawn):
                self._drawn.append(draw_bytes(size, device, self._generator))
            return self._drawn[number]

        return draw
