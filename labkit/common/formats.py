"""Formats numbers for people: decimal bytes, milliseconds, percentages, points; an unknown value is ``–``."""

from __future__ import annotations

import math
import re

from labkit.common.errors import LabError


def format_bytes(value: float | None) -> str:
    """Decimal units, three digits: ``98.3 MB``, ``41.2 GB``; ``–`` for None."""
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float | None) -> str:
    """``340 ms`` below a second, ``1.25 s`` above; ``–`` for None."""
    if value is None:
        return "–"
    return f"{_three_digits(value * 1000)} ms" if value < 0.9995 else f"{_three_digits(value)} s"


def format_change(value: float | None) -> str:
    """A fraction as a signed percentage: ``−62 %``; ``–`` for None."""
    return "–" if value is None else f"{round(value * 100):+d} %".replace("-", "−").replace("+0 %", "±0 %")


def format_points(value: float | None, digits: int = 1) -> str:
    """A difference of rates in signed percentage points: ``−2.5 points``; ``–`` for None."""
    if value is None:
        return "–"
    text = f"{value * 100:+.{digits}f}".replace("-", "−")
    return ("±" + text[1:] if float(text[1:]) == 0 else text) + " points"


def format_rate(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A rate as a percentage, with its interval if given: ``97.5 % [94.3, 98.9]``; ``–`` for None."""
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" [{low * 100:.1f}, {high * 100:.1f}]"
    return f"{value * 100:.1f} %{ends}"


def format_difference(value: float | None, low: float | None, high: float | None) -> str:
    """A paired difference of rates in points, with its interval: ``−2.5 [−4.6, −0.4]``."""
    if value is None:
        return "–"
    text = format_points(value).removesuffix(" points")
    ends = "" if low is None or high is None else f" [{low * 100:+.1f}, {high * 100:+.1f}]"
    return text + ends.replace("-", "−")


def format_perplexity(value: float) -> str:
    """``12.34``; from a million on ``3.2e+25``; ``∞`` beyond what a float holds."""
    return f"{value:.2f}" if value < 1e6 else "∞" if value == math.inf else f"{value:.1e}"


def format_rate_per_s(value: float | None) -> str:
    """Tokens per second: ``39.9 tok/s``; ``–`` for None."""
    return "–" if value is None else f"{_three_digits(value)} tok/s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(text: str | int) -> int:
    """``60MB`` -> 60,000,000; units are B, kB, MB, GB and KiB, MiB, GiB; an int is bytes.

    Raises:
        LabError: the text is malformed or has no unit, or the size is not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(text).strip())
    unit = UNITS.get(match[2].lower()) if match else None
    has_unit = match is not None and (match[2] or isinstance(text, int))
    size = round(float(match[1]) * unit) if unit else 0
    if size < 1 or not has_unit:
        meant = f"; {match[1]}GB?" if size and not has_unit else ""
        raise LabError(f"an amount of memory is written 60MB or 5.5GB, not {text!r}{meant}")
    return size
