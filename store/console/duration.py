"""Writes durations as people say them."""


def duration(seconds: float) -> str:
    """Seconds as a text such as `12.3 s`, `4 min 10 s`, `2 h 5 min` or `3 d 4 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    first = next(position for position, (_, size) in enumerate(units) if whole >= size)
    (large, size), rest = units[first], units[first + 1 : first + 2]
    text, left = f"{whole // size} {large}", whole % size
    for small, small_size in rest:
        text += f" {left // small_size} {small}" if left >= small_size else ""
    return text
