"""Writes durations as people say them."""

from itertools import pairwise

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Seconds as a text such as `12.3 s`, `4 min 10 s`, `2 h 5 min` or `3 d 4 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    (large, size), (small, small_size) = next(pair for pair in pairwise(_UNITS) if whole >= pair[0][1])
    rest = whole % size // small_size
    return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
