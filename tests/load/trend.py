"""Does something grow? A slope that outliers do not move, with the bounds between which it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.96
"""Of the normal distribution: 95 % lie within so many standard deviations."""
_BLOCKS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Units of y for one of x."""

    middle: float
    low: float
    """It is above this with a probability of 97.5 %, ..."""
    high: float
    """... and below this."""


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """The median slope over all pairs of points (Theil 1950), bounded as by Sen 1968.

    Those bounds take points for independent of each other, which samples of a process's memory, seconds apart, are not: so what
    goes in are the medians of 40 blocks of neighbours.

    Args:
        x: growing.

    Raises:
        ValueError: for fewer than 5 points.
    """
    if len(x) < 5:
        raise ValueError(f"a slope needs 5 points or more, not {len(x)}")
    xs, ys = _block_medians(x), _block_medians(y)
    first, second = np.triu_indices(len(xs), 1)
    apart = xs[second] - xs[first]
    slopes = np.sort((ys[second] - ys[first])[apart > 0] / apart[apart > 0])
    n = len(xs)
    reach = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(0, math.floor((len(slopes) - reach) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2))
    return Slope(middle=float(np.median(slopes)), low=float(slopes[low]), high=float(slopes[high]))


def _block_medians(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    blocks = np.array_split(np.asarray(values, np.float64), min(_BLOCKS, len(values)))
    return np.array([np.median(block) for block in blocks])
