"""Numbers as text: bytes, durations, metrics."""

from __future__ import annotations

import math


def human_bytes(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """Return a duration in the two largest units that it needs."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Return a number with four decimals, or four digits where those would be mostly zeros; a dash where none is."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
