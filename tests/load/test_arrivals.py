from __future__ import annotations

import itertools
import math
import statistics

import pytest

from tests.load.arrivals import ArrivalError, poisson


def test_the_rate_is_the_one_asked_for() -> None:
    times = poisson(200, 100, seed=7)
    # Poisson counts: mean 20,000, standard deviation 141.
    assert abs(len(times) - 20_000) < 4 * math.sqrt(20_000)
    assert times == sorted(times)
    assert times[0] > 0 and times[-1] < 100


def test_gaps_are_exponential() -> None:
    times = poisson(100, 200, seed=3)
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    assert statistics.fmean(gaps) == pytest.approx(0.01, rel=0.03)
    # Kolmogorov-Smirnov against 1 - exp(-rate t); the critical value at 0.1 % is 1.95 / sqrt(n).
    distance = max(abs(1 - math.exp(-100 * gap) - (index + 0.5) / len(gaps)) for index, gap in enumerate(gaps))
    assert distance < 1.95 / math.sqrt(len(gaps))


def test_the_seed_fixes_the_schedule() -> None:
    assert poisson(50, 2, seed=1) == poisson(50, 2, seed=1)
    assert poisson(50, 2, seed=1) != poisson(50, 2, seed=2)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, 601), (1, math.inf), (1e6, 10)])
def test_an_empty_endless_or_huge_schedule_is_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ArrivalError):
        poisson(rate, seconds, seed=1)
