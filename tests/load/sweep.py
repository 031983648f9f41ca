"""Which rates to offer: a short probe finds the capacity, fractions of it make the curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from .ledger import OK
from .plan import Plan
from .stage import Outcome, StageError

FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.2)
PROBE_CONCURRENCIES = (16, 64, 256)


def probe_capacity(plan: Plan, run: Callable[[Plan], Outcome], *, seconds: float = 3.0) -> float:
    """Requests a second that the server completes when it always has enough to do.

    Raises the number of requests in flight until that gains less than a tenth.

    Raises:
        StageError: when nothing succeeds.
    """
    best = 0.0
    for concurrency in PROBE_CONCURRENCIES:
        outcome = run(replace(plan, schedule=None, concurrency=concurrency, seconds=seconds))
        good = [record.done for record in outcome.records if record.code == OK]
        if not good:
            codes = sorted({record.code for record in outcome.records})
            raise StageError(f"no request succeeded in the capacity probe ({', '.join(codes)})")
        rate = len(good) / max(seconds, *good)
        if rate < 1.1 * best:
            break
        best = rate
    return max(best, rate)


def rates_around(capacity: float) -> list[float]:
    """Rates below, at and above the capacity, rounded to two digits, ascending."""
    return sorted({_two_digits(fraction * capacity) for fraction in FRACTIONS})


def _two_digits(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(round(value / step) * step, 6)
