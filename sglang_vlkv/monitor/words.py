"""Numbers as people read them, and as bars."""

from __future__ import annotations

import math

BLOCKS = "▁▂▃▄▅▆▇█"


def bars_of(heights: list[float], width: int) -> str:
    """A bar per height in [0, 1], up to four columns wide."""
    columns = max(1, min(4, width // len(heights)))
    signs = [BLOCKS[min(8, math.ceil(height * 8)) - 1] if height > 0 else " " for height in heights]
    return "".join(sign * max(1, columns - 1) + " " * (columns > 1) for sign in signs)


def resample(values: list[float], width: int) -> list[float]:
    """At most ``width`` values, means of neighbours where there are more."""
    if len(values) <= width:
        return values
    ends = [round(i * len(values) / width) for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:])]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def count(number: int) -> str:
    return f"{number:,}"


def size_of(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    seconds = int(max(0, seconds))
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
