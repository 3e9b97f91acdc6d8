"""95 % intervals: of rates, of means, and of paired differences."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Half-width, in standard errors, of a two-sided 95 % interval."""


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; ``(0.0, 1.0)`` when `count` is 0 (Wilson 1927)."""
    if not 0 <= successes <= count:
        raise ValueError(f"successes must lie in 0…{count}, not {successes}")
    if count == 0:
        return 0.0, 1.0
    rate, square = successes / count, Z95 * Z95
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """``(mean, low, high)`` with the 95 % normal interval; its ends are None for fewer than two values."""
    count = len(values)
    if count == 0:
        return None, None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    half = Z95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - half, mean + half


def paired_difference(
    values: Sequence[float | bool], reference: Sequence[float | bool]
) -> tuple[float | None, float | None, float | None]:
    """``(mean, low, high)`` of ``values[i] - reference[i]``, two measurements of the same items.

    Negative means: lower than the reference. The interval covers 95 %: for hits and misses (booleans) the
    adjusted Wald interval of paired proportions (Bonett and Price 2012), which stays honest when both agree
    on every item; for numbers the normal interval of the mean difference. All None without items.
    Raises ValueError if the lengths differ.
    """
    if len(values) != len(reference):
        raise ValueError(f"paired values must match item by item: {len(values)} and {len(reference)} differ")
    if not values:
        return None, None, None
    differences = [float(a) - float(b) for a, b in zip(values, reference)]
    if not all(isinstance(value, bool) for value in (*values, *reference)):
        return mean_interval(differences)
    count = len(values)
    gained = (sum(d > 0 for d in differences) + 1) / (count + 2)
    lost = (sum(d < 0 for d in differences) + 1) / (count + 2)
    centre = gained - lost
    half = Z95 * math.sqrt((gained + lost - centre * centre) / (count + 2))
    return math.fsum(differences) / count, max(-1.0, centre - half), min(1.0, centre + half)
