"""When requests are to be sent: a Poisson process, fixed by its seed before the first one goes out."""

from __future__ import annotations

import random

MAX_SECONDS = 600.0
MAX_REQUESTS = 100_000


class ArrivalError(ValueError):
    """A schedule that would be empty, endless or too large."""


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Planned send times, in seconds from the start, ascending, all before ``seconds``.

    Users do not wait for one another, so the gaps between requests are exponential with mean 1/rate, and a slow answer delays
    no later request (open loop).

    Raises:
        ArrivalError: for a rate or a length that is not above 0 or exceeds this module's bounds.
    """
    if not rate > 0:
        raise ArrivalError(f"rate must be above 0, not {rate:g}")
    if not 0 < seconds <= MAX_SECONDS:
        raise ArrivalError(f"seconds must be above 0 and at most {MAX_SECONDS:g}, not {seconds:g}")
    if rate * seconds > MAX_REQUESTS:
        raise ArrivalError(f"{rate:g} requests/s for {seconds:g} s are more than the limit of {MAX_REQUESTS} requests")
    gaps = random.Random(seed)
    times: list[float] = []
    now = gaps.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += gaps.expovariate(rate)
    return times
